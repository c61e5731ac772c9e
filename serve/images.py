"""Alias of `bpkd_sdk.images.read_image`, the only reader of images, for code that imports it from here."""

from bpkd_sdk.images import read_image as read_image
