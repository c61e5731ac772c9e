/* Runs in a worker: decodes an image, runs the network on it by the rule `fit`, and returns its mask.

The rule and its arithmetic are those of bpkd_sdk/runtime/fit.py, bpkd_sdk/runtime/inference.py and bpkd_sdk/sizes.py,
and the functions have the same names. A size is [height, width]. An image is {data, height, width} with RGB bytes. */

const SMALLEST_SIDE = 32; // a shorter side counts as this many pixels, because networks pad images to about this size
let config, ort, session;

class ImageError extends Error {}

let work = Promise.resolve(); // one message is handled after another, because a session runs one image at a time
onmessage = ({ data }) => {
  work = work.then(() => handle(data));
};

async function handle(message) {
  try {
    postMessage(message.type === "open" ? await open(message) : await segment(message));
  } catch (error) {
    const type = error instanceof ImageError ? "rejected" : "failed";
    postMessage({ type, id: message.id, reason: error?.message || String(error) });
  }
}

/* Loads ONNX Runtime and the network, and runs the network once, so that errors occur before the page is ready. */
async function open(message) {
  config = message.config;
  const isWebgpu = message.backend === "webgpu";
  const folder = message.base + config.runtime;
  ort = await import(folder + (isWebgpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"));
  ort.env.wasm.wasmPaths = folder;
  ort.env.logLevel = "error";
  const response = await fetch(message.base + config.file);
  if (!response.ok) throw new Error(`The server answers ${response.status} for ${config.file}.`);
  const options = { executionProviders: [isWebgpu ? "webgpu" : "wasm"], logSeverityLevel: 3 };
  session = await ort.InferenceSession.create(await response.arrayBuffer(), options);
  const [height, width] = config.size ?? [64, 64];
  await run({ data: new Uint8Array(height * width * 3), height, width }, newTimer());
  return { type: "ready", threads: isWebgpu ? 0 : ort.env.wasm.numThreads };
}

async function segment({ source, fit, id }) {
  const timer = newTimer();
  const { rgba, image } = await timer.stage("pre", () => readImage(source));
  const mask = await fittedMask(image, fit, timer);
  const milliseconds = timer.stop();
  const { height, width } = image;
  return { type: "mask", id, rgba, mask, height, width, milliseconds, runs: timer.runs };
}

/* Decodes a file or takes a frame, upright and without its colour profile; transparent parts are over white. */
async function readImage(source) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = source instanceof ImageBitmap ? source : await createImageBitmap(source, options).catch(() => {
    throw new ImageError("This browser cannot read the file as an image. Choose a JPEG, PNG or WebP file.");
  });
  const { height, width } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(height * width * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return { rgba, image: { data, height, width } };
}

/* Adds up the time of the stages; time outside of "pre" and "inference" is "post". */
function newTimer() {
  const start = performance.now();
  const spent = { pre: 0, inference: 0 };
  return {
    runs: 0,
    async stage(name, action) {
      const begin = performance.now();
      const result = await action();
      spent[name] += performance.now() - begin;
      return result;
    },
    stop: () => ({ ...spent, post: performance.now() - start - spent.pre - spent.inference }),
  };
}

function fitSize(size, fit) {
  const fixed = config.size;
  if (fixed ? size[0] === fixed[0] && size[1] === fixed[1] : countPixels(size) <= config.maxPixels) return { inner: size, window: size };
  if (fit === "slide") return { inner: size, window: fixed ?? size.map((side) => Math.min(side, config.windowSide)) };
  const factors = fixed ? fixed.map((side, axis) => side / size[axis]) : [Math.sqrt(config.maxPixels / (size[0] * size[1]))];
  const inner = scaledSize(size, Math.min(1, ...factors));
  const window = fixed ?? inner;
  return { inner: fit === "resize" ? window : inner, window };
}

function scaledSize(size, factor) {
  return size.map((side) => Math.max(1, Math.floor(side * factor + 0.5)));
}

function countPixels(size) {
  return Math.max(size[0], SMALLEST_SIDE) * Math.max(size[1], SMALLEST_SIDE);
}

/* Returns the class id of each pixel of an image of any size. */
async function fittedMask(image, fit, timer) {
  const size = [image.height, image.width];
  const { inner, window } = fitSize(size, fit);
  const input = await timer.stage("pre", () => padImage(resizeImage(image, inner), inner.map((side, axis) => Math.max(side, window[axis]))));
  if (input.height !== window[0] || input.width !== window[1]) {
    const mask = await (config.argmax ? slidingMasks : slidingLogits)(input, window, timer);
    return cropMask(mask, input.width, size);
  }
  const output = await run(input, timer);
  if (config.argmax) return resizeLabel(cropMask(output.data, input.width, inner), inner, size);
  return resizedClasses(output, input, inner, size);
}

/* Runs the network on an image of a size that it accepts: class ids, or logits of shape (C, height, width). */
async function run({ data, height, width }, timer) {
  const tensor = await timer.stage("pre", () =>
    config.preprocess ? new ort.Tensor("uint8", data, [1, height, width, 3]) : new ort.Tensor("float32", normalize(data), [1, 3, height, width]),
  );
  timer.runs += 1;
  return timer.stage("inference", async () => {
    const output = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
    return { data: output.data, channels: output.dims.length === 4 ? output.dims[1] : 0 };
  });
}

function normalize(data) {
  const pixels = data.length / 3;
  const values = new Float32Array(data.length);
  for (let channel = 0; channel < 3; channel++) {
    const mean = config.mean[channel], std = config.std[channel];
    for (let pixel = 0; pixel < pixels; pixel++) values[channel * pixels + pixel] = (data[3 * pixel + channel] / 255 - mean) / std;
  }
  return values;
}

/* Resizes bilinearly about pixel centres, with antialiasing where the image shrinks: first the rows, then the columns. */
function resizeImage(image, [height, width]) {
  if (image.height === height && image.width === width) return image;
  const columns = filterWeights(image.width, width);
  const wide = new Float32Array(image.height * width * 3);
  for (let row = 0; row < image.height; row++) {
    for (let column = 0; column < width; column++) {
      const { first, weights } = columns[column];
      let red = 0, green = 0, blue = 0;
      for (let index = 0, from = (row * image.width + first) * 3; index < weights.length; index++) {
        red += weights[index] * image.data[from++];
        green += weights[index] * image.data[from++];
        blue += weights[index] * image.data[from++];
      }
      const to = (row * width + column) * 3;
      wide[to] = red;
      wide[to + 1] = green;
      wide[to + 2] = blue;
    }
  }
  const data = new Uint8ClampedArray(height * width * 3); // rounds halves to even, as torch does
  const line = new Float32Array(width * 3);
  filterWeights(image.height, height).forEach(({ first, weights }, row) => {
    line.fill(0);
    weights.forEach((weight, index) => {
      const from = (first + index) * width * 3;
      for (let value = 0; value < line.length; value++) line[value] += weight * wide[from + value];
    });
    data.set(line, row * width * 3);
  });
  return { data: new Uint8Array(data.buffer), height, width };
}

/* Returns the pixels that each of `cells` output pixels depends on along one axis, and their weights: a triangle. */
function filterWeights(length, cells) {
  const scale = length / cells;
  const support = Math.max(scale, 1);
  return Array.from({ length: cells }, (_, cell) => {
    const center = scale * (cell + 0.5);
    const first = Math.max(Math.floor(center - support + 0.5), 0);
    const end = Math.min(Math.floor(center + support + 0.5), length);
    const weights = Array.from({ length: end - first }, (_, index) => Math.max(0, 1 - Math.abs(index + first - center + 0.5) / support));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/* Appends pixels of the network's mean colour at the right and bottom. */
function padImage(image, [height, width]) {
  if (image.height === height && image.width === width) return image;
  const data = new Uint8Array(height * width * 3);
  for (let index = 0; index < data.length; index++) data[index] = config.padding[index % 3];
  for (let row = 0; row < image.height; row++) {
    data.set(image.data.subarray(row * image.width * 3, (row + 1) * image.width * 3), row * width * 3);
  }
  return { data, height, width };
}

function cropImage(image, top, left, [height, width]) {
  const data = new Uint8Array(height * width * 3);
  for (let row = 0; row < height; row++) {
    const start = ((top + row) * image.width + left) * 3;
    data.set(image.data.subarray(start, start + width * 3), row * width * 3);
  }
  return { data, height, width };
}

function cropMask(mask, stride, [height, width]) {
  if (mask.length === height * width) return mask;
  const cropped = new Uint8Array(height * width);
  for (let row = 0; row < height; row++) cropped.set(mask.subarray(row * stride, row * stride + width), row * width);
  return cropped;
}

function windowStarts(length, window) {
  const stride = Math.max(1, Math.floor((window * 2) / 3));
  const count = Math.max(Math.ceil((length - window) / stride), 0) + 1;
  return Array.from({ length: count }, (_, index) => Math.max(Math.min(index * stride, length - window), 0));
}

/* Joins the masks of windows: each pixel comes from the window whose centre is nearest. */
async function slidingMasks(image, window, timer) {
  const result = new Uint8Array(image.height * image.width);
  const [rows, columns] = [windowShares(image.height, window[0]), windowShares(image.width, window[1])];
  for (const [top, firstRow, endRow] of rows) {
    for (const [left, firstColumn, endColumn] of columns) {
      const part = await timer.stage("pre", () => cropImage(image, top, left, window));
      const { data } = await run(part, timer);
      for (let row = firstRow; row < endRow; row++) {
        const from = (row - top) * window[1] - left;
        result.set(data.subarray(from + firstColumn, from + endColumn), row * image.width + firstColumn);
      }
    }
  }
  return result;
}

/* Returns the start of each window along one axis, and the first and the end of the pixels that are taken from it. */
function windowShares(length, window) {
  const starts = windowStarts(length, window);
  const cuts = starts.slice(1).map((start, index) => Math.floor((starts[index] + window + start) / 2));
  return starts.map((start, index) => [start, cuts[index - 1] ?? 0, cuts[index] ?? length]);
}

/* Returns the largest class of the logits' sum over windows, row by row of windows. Their mean has the same one. */
async function slidingLogits(image, window, timer) {
  const [height, width] = [image.height, image.width];
  const result = new Uint8Array(height * width);
  const tops = windowStarts(height, window[0]);
  let band, channels;
  for (const [index, top] of tops.entries()) {
    for (const left of windowStarts(width, window[1])) {
      const part = await timer.stage("pre", () => cropImage(image, top, left, window));
      const output = await run(part, timer);
      channels = output.channels;
      band ??= new Float32Array(channels * window[0] * width);
      for (let line = 0; line < channels * window[0]; line++) {
        const from = line * window[1], to = line * width + left;
        for (let column = 0; column < window[1]; column++) band[to + column] += output.data[from + column];
      }
    }
    const done = (tops[index + 1] ?? height) - top;
    const plane = window[0] * width;
    result.set(classesOf(band, channels, plane, done * width), top * width);
    for (let channel = 0; channel < channels; channel++) {
      band.copyWithin(channel * plane, channel * plane + done * width, (channel + 1) * plane);
      band.fill(0, (channel + 1) * plane - done * width, (channel + 1) * plane);
    }
  }
  return result;
}

/* Returns the class ids of the first `count` pixels: the largest logit, or for one channel, logit > 0. */
function classesOf(logits, channels, plane, count) {
  const classes = new Uint8Array(count);
  if (channels === 1) return classes.map((_, pixel) => Number(logits[pixel] > 0));
  const largest = logits.slice(0, count);
  for (let channel = 1; channel < channels; channel++) {
    for (let pixel = 0, from = channel * plane; pixel < count; pixel++, from++) {
      if (logits[from] > largest[pixel]) {
        largest[pixel] = logits[from];
        classes[pixel] = channel;
      }
    }
  }
  return classes;
}

/* Resizes the logits of one image bilinearly from the part `inner` of it to a size, and returns the class ids. */
function resizedClasses({ data, channels }, input, inner, size) {
  const plane = input.height * input.width;
  if (inner[0] === size[0] && inner[1] === size[1]) return cropMask(classesOf(data, channels, plane, plane), input.width, size);
  const [rows, columns] = inner.map((length, axis) => neighbors(length, size[axis]));
  const line = new Float32Array(channels * size[1]);
  const mask = new Uint8Array(size[0] * size[1]);
  rows.forEach(([above, below, down], row) => {
    for (let channel = 0; channel < channels; channel++) {
      const upper = channel * plane + above * input.width, lower = channel * plane + below * input.width;
      columns.forEach(([left, right, across], column) => {
        const top = data[upper + left] + across * (data[upper + right] - data[upper + left]);
        const bottom = data[lower + left] + across * (data[lower + right] - data[lower + left]);
        line[channel * size[1] + column] = top + down * (bottom - top);
      });
    }
    mask.set(classesOf(line, channels, size[1], size[1]), row * size[1]);
  });
  return mask;
}

/* Returns the two pixels next to the centre of each of `cells` output pixels, and the second one's weight. */
function neighbors(length, cells) {
  return Array.from({ length: cells }, (_, cell) => {
    const position = Math.min(Math.max((cell + 0.5) * (length / cells) - 0.5, 0), length - 1);
    const first = Math.floor(position);
    return [first, Math.min(first + 1, length - 1), position - first];
  });
}

function resizeLabel(mask, before, after) {
  if (before[0] === after[0] && before[1] === after[1]) return mask;
  const [rows, columns] = before.map((length, axis) => nearestPixels(length, after[axis]));
  const resized = new Uint8Array(after[0] * after[1]);
  rows.forEach((from, row) => columns.forEach((column, to) => (resized[row * after[1] + to] = mask[from * before[1] + column])));
  return resized;
}

function nearestPixels(length, cells) {
  return Array.from({ length: cells }, (_, cell) => {
    const center = (2 * cell + 1) * length; // in units of 1 / (2 cells) pixels
    const isTie = center % (2 * cells) === 0;
    return Math.floor(center / (2 * cells)) - Number(isTie && cell % 2 === 1);
  });
}
