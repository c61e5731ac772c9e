import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from bpkd_sdk.serve import annotate_video
from tests.serve.cases import scene


def write_video(path, images, times, codec="libx264", pixels="yuv420p"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return stream.codec.name, [time for time, _ in frames], [image for _, image in frames]


def same(image):
    return image


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", [scene(48, 64, index) for index in range(4)], [0, 40, 133, 160])


def test_every_frame_is_drawn_and_keeps_its_time(clip, tmp_path):
    target = tmp_path / "out.mp4"
    shares = list(annotate_video(clip, target, lambda image: np.full_like(image, 255 if image.mean() > 0 else 0)))
    assert len(shares) == 4
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    codec, times, images = read_video(target)
    assert codec == "h264"
    assert times == pytest.approx([0, 0.04, 0.133, 0.16])
    assert all(image.shape == (48, 64, 3) and image.min() > 250 for image in images)


@pytest.mark.parametrize(("suffix", "codec"), [(".webm", "libvpx"), (".avi", "mpeg4"), (".mkv", "libx264")])
def test_other_containers_are_read(tmp_path, suffix, codec):
    source = write_video(tmp_path / f"clip{suffix}", [scene(48, 64)] * 3, [0, 40, 80], codec)
    list(annotate_video(source, tmp_path / "out.mp4", same))
    _, times, images = read_video(tmp_path / "out.mp4")
    assert len(times) == 3
    assert np.abs(images[0].astype(int) - scene(48, 64)).mean() < 12


def test_odd_sides_are_padded_by_one_pixel(tmp_path):
    source = write_video(tmp_path / "clip.avi", [scene(47, 63)] * 2, [0, 40], "ffv1")
    list(annotate_video(source, tmp_path / "out.mp4", same))
    assert read_video(tmp_path / "out.mp4")[2][0].shape == (48, 64, 3)


def test_the_rotation_of_a_phone_video_is_applied(clip, tmp_path):
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    rotated = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # by 90 degrees, clockwise
    content = clip.read_bytes()
    track = content.index(b"tkhd")
    clip.write_bytes(content[:track] + content[track:].replace(upright, rotated, 1))
    frames = []
    list(annotate_video(clip, tmp_path / "out.mp4", lambda image: frames.append(image) or image))
    assert frames[0].shape == (64, 48, 3)
    expected = np.rot90(scene(48, 64), -1).astype(int)
    assert np.abs(frames[0] - expected).mean() < 12
    assert read_video(tmp_path / "out.mp4")[2][0].shape == (64, 48, 3)


def test_a_stopped_iteration_leaves_no_file(clip, tmp_path):
    progress = annotate_video(clip, tmp_path / "out.mp4", same)
    next(progress)
    progress.close()
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    "content",
    [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile clip.mp4\n"],
    ids=["empty", "text", "playlist", "list of files"],
)
def test_a_file_that_is_not_a_video_is_rejected(clip, tmp_path, content):
    source = tmp_path / "video.mp4"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"video\.mp4 cannot be read as a video"):
        list(annotate_video(source, tmp_path / "out.mp4", same))
    assert not (tmp_path / "out.mp4").exists()


def test_the_size_and_number_of_frames_are_bounded(clip, tmp_path):
    frames = len(read_video(clip)[2])
    list(annotate_video(clip, tmp_path / "out.mp4", same, max_pixels=48 * 64, max_frames=frames))
    with pytest.raises(ValueError, match="frames of at most 3,071 pixels, but got 48 x 64 .height x width."):
        list(annotate_video(clip, tmp_path / "large.mp4", same, max_pixels=48 * 64 - 1))
    with pytest.raises(ValueError, match=f"at most {frames - 1} frames"):
        list(annotate_video(clip, tmp_path / "long.mp4", same, max_frames=frames - 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_frames_that_become_larger_are_not_decoded(tmp_path):
    small, large = (
        write_video(tmp_path / f"{side}.ts", [scene(side, side)] * 30, range(0, 1200, 40), "libx264")
        for side in (64, 512)
    )
    (tmp_path / "grows.ts").write_bytes(small.read_bytes() + large.read_bytes())
    sides = set()
    with pytest.raises(ValueError, match="cannot be read as a video"):
        list(
            annotate_video(
                tmp_path / "grows.ts",
                tmp_path / "out.mp4",
                lambda image: sides.add(image.shape[0]) or image,
                max_pixels=100 * 100,
            )
        )
    assert sides == {64}


def test_the_error_for_a_missing_file_contains_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video at .*none\.mp4"):
        list(annotate_video(tmp_path / "none.mp4", tmp_path / "out.mp4", same))


def test_a_file_with_audio_only_is_rejected(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="contains no video stream"):
        list(annotate_video(tmp_path / "sound.mkv", tmp_path / "out.mp4", same))
