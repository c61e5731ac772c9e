/* The page: its controls, and the picture of the last result of the worker that `engine.js` describes. */

const config = JSON.parse(document.getElementById("config").textContent);
const $ = (id) => document.getElementById(id);
const NAMES = { webgpu: "WebGPU", wasm: "WebAssembly" };
const SHARPEST = 400; // shorter images are shown enlarged, with visible pixels
let engine; // worker and state of the network, see startEngine
let shown; // last result: rgba, mask, height, width
let pending; // file or frame that the engine works on
let last; // last file, which is segmented again if a choice changes
let stream; // of the camera
let count = 0; // inputs so far; a result of an earlier input is ignored

/* Starts a worker for a backend; if WebGPU cannot run the network, one for WebAssembly. */
function startEngine(backend, prefix = "") {
  engine?.worker.terminate();
  const url = URL.createObjectURL(new Blob([$("engine").textContent], { type: "text/javascript" }));
  const started = { worker: new Worker(url, { type: "module" }), name: NAMES[backend], isReady: false };
  engine = started;
  $("backend").value = backend;
  say(`${prefix}Loading the network and ONNX Runtime …`);
  const fail = (reason) => {
    if (engine !== started) return;
    if (backend === "webgpu") startEngine("wasm", `WebGPU cannot run this network (${shorten(reason)}). `);
    else giveUp(started.isReady ? `The image cannot be segmented: ${reason}` : `The network cannot be loaded: ${reason}`);
  };
  started.worker.onerror = (event) => fail(event.message || "the worker cannot start.");
  started.worker.onmessage = ({ data }) => {
    URL.revokeObjectURL(url);
    if (data.type === "failed") fail(data.reason);
    else if (data.type === "rejected" && data.id === count) giveUp(data.reason);
    else if (data.type === "mask" && data.id === count) show(data);
    else if (data.type === "ready") {
      if (data.threads) started.name += `, ${data.threads} ${data.threads === 1 ? "thread" : "threads"}`;
      started.isReady = true;
      say(`${prefix}Ready: ${started.name}.`);
      if (stream) nextFrame();
      else send();
    }
  };
  started.worker.postMessage({ type: "open", config, backend, base: new URL(".", document.baseURI).href });
}

/* Segments a file or a frame as soon as the network is loaded. */
function segment(source) {
  pending = source;
  count += 1;
  if (engine?.isReady) send();
}

function send() {
  if (!pending) return;
  if (!stream) say(`Segmenting in ${engine.name} …`);
  const transferred = pending instanceof ImageBitmap ? [pending] : [];
  engine.worker.postMessage({ type: "segment", source: pending, fit: $("fit").value, id: count }, transferred);
}

function giveUp(reason) {
  stopCamera();
  pending = null;
  say(reason);
}

function shorten(reason) {
  return reason.length > 160 ? `${reason.slice(0, 160)} …` : reason;
}

function say(text) {
  $("status").textContent = text;
}

function show(result) {
  shown = result;
  draw();
  showTime(result.milliseconds, result.runs);
  showClasses(result.mask);
  $("save-mask").disabled = $("save-overlay").disabled = false;
  if (stream) return requestAnimationFrame(nextFrame);
  last = pending;
  pending = null;
  say(`${result.width} × ${result.height} pixels, segmented in ${engine.name}.`);
}

/* Draws class colours over the image, (1 - opacity) image + opacity colour, and lines between classes. */
function draw() {
  if (!shown) return;
  const { rgba, mask, height, width } = shown;
  const opacity = $("opacity").value / 100;
  const picture = new ImageData(width, height);
  const out = picture.data; // rounds halves to even, as bpkd_sdk.serve.draw_overlay does
  const colors = Float32Array.from(config.classes.flatMap(({ color }) => color), (value) => opacity * value);
  for (let pixel = 0, at = 0; pixel < mask.length; pixel++, at += 4) {
    const color = 3 * mask[pixel];
    out[at] = (1 - opacity) * rgba[at] + colors[color];
    out[at + 1] = (1 - opacity) * rgba[at + 1] + colors[color + 1];
    out[at + 2] = (1 - opacity) * rgba[at + 2] + colors[color + 2];
    out[at + 3] = 255;
  }
  if ($("boundaries").checked) drawBoundaries(picture, mask);
  const canvas = $("picture");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
  canvas.classList.toggle("small", Math.max(height, width) < SHARPEST);
  canvas.hidden = false;
  $("empty").hidden = true;
}

/* Draws white lines, as wide as they have to be to be visible when a large image is shrunk to the page. */
function drawBoundaries({ data, width, height }, mask) {
  const thickness = Math.max(1, Math.round(Math.max(width, height) / 1200));
  const before = Math.floor((thickness - 1) / 2);
  for (let row = 0, pixel = 0; row < height; row++) {
    for (let column = 0; column < width; column++, pixel++) {
      const isBorder = (column + 1 < width && mask[pixel] !== mask[pixel + 1]) || (row + 1 < height && mask[pixel] !== mask[pixel + width]);
      if (!isBorder) continue;
      for (let y = Math.max(row - before, 0); y < Math.min(row - before + thickness, height); y++) {
        const left = Math.max(column - before, 0), right = Math.min(column - before + thickness, width);
        data.fill(255, 4 * (y * width + left), 4 * (y * width + right));
      }
    }
  }
}

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

function showTime(milliseconds, runs) {
  const total = Object.values(milliseconds).reduce((sum, value) => sum + value, 0);
  for (const [stage, value] of Object.entries(milliseconds)) {
    $(stage).textContent = ms(value);
    $(`bar-${stage}`).style.flexGrow = value / total;
  }
  $("total").textContent = ms(total);
  $("rate").textContent = stream ? `${frameRate().toFixed(1)} frames per second` : "";
  $("runs").textContent = runs > 1 ? `The network ran on ${runs} windows of the image.` : "";
}

/* Lists the classes that the mask contains, with their shares of the pixels, and those that it does not contain. */
function showClasses(mask) {
  const pixels = new Uint32Array(256);
  if (mask) for (const id of mask) pixels[id] += 1;
  const entries = config.classes.map((entry, id) => ({ ...entry, pixels: pixels[id] }));
  // In the video of a camera, the order of the classes would change all the time if it depended on their shares.
  entries.sort((one, other) => (stream ? Boolean(other.pixels) - Boolean(one.pixels) : other.pixels - one.pixels));
  const rows = entries.map((entry) => {
    const row = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${entry.color.join(" ")})`;
    const name = document.createElement("span");
    name.textContent = entry.name;
    row.append(swatch, name);
    if (mask && entry.pixels) row.append(`${((100 * entry.pixels) / mask.length).toFixed(1)} %`);
    row.classList.toggle("none", Boolean(mask) && !entry.pixels);
    return row;
  });
  $("classes").replaceChildren(...rows);
  const present = entries.filter((entry) => entry.pixels).map((entry) => entry.name);
  $("picture").setAttribute("aria-label", `Segmented image: ${present.join(", ")}`);
}

/* Camera: one frame at a time, so that the network always gets the newest one. */
const video = document.createElement("video");
video.muted = video.playsInline = true;
let frameTimes = [];

async function startCamera() {
  if (!navigator.mediaDevices) return say("The browser offers a camera only to pages from https:// or from localhost.");
  const [height, width] = config.size ?? [480, 640];
  $("camera").disabled = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: width }, height: { ideal: height } } });
  } catch (error) {
    return say(error.name === "NotFoundError" ? "There is no camera." : `The camera cannot be used: ${error.message}`);
  } finally {
    $("camera").disabled = false;
  }
  $("camera").textContent = "Stop the camera";
  say("The camera is running.");
  video.srcObject = stream;
  frameTimes = [];
  stream.getTracks()[0].onended = stopCamera;
  await video.play();
  nextFrame();
}

async function nextFrame() {
  if (!stream || !video.videoWidth) return;
  const frame = await createImageBitmap(video);
  if (stream) segment(frame);
}

function frameRate() {
  frameTimes = [...frameTimes.slice(-20), performance.now()];
  return frameTimes.length < 2 ? 0 : (1000 * (frameTimes.length - 1)) / (frameTimes.at(-1) - frameTimes[0]);
}

function stopCamera() {
  if (!stream) return;
  stream.getTracks().forEach((track) => track.stop());
  stream = last = pending = null;
  count += 1; // the result of the last frame is ignored
  $("camera").textContent = "Use the camera";
  say("The camera is off.");
}

function choose(file) {
  if (!file) return;
  stopCamera();
  segment(file);
}

/* Returns a PNG file, 8-bit grey, whose values are the class ids. */
async function encodeMask({ mask, height, width }) {
  const lines = new Uint8Array(height * (width + 1)); // each line starts with its filter, 0
  for (let row = 0; row < height; row++) lines.set(mask.subarray(row * width, (row + 1) * width), row * (width + 1) + 1);
  const deflated = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8);
  const parts = [["IHDR", new Uint8Array(header.buffer)], ["IDAT", new Uint8Array(await new Response(deflated).arrayBuffer())], ["IEND", new Uint8Array()]];
  return new Blob([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), ...parts.map(([type, data]) => encodeChunk(type, data))], { type: "image/png" });
}

function encodeChunk(type, data) {
  const chunk = new Uint8Array(data.length + 12);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length);
  chunk.set(new TextEncoder().encode(type), 4);
  chunk.set(data, 8);
  let crc = -1;
  for (const byte of chunk.subarray(4, data.length + 8)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  view.setUint32(data.length + 8, ~crc);
  return chunk;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function showExamples() {
  config.examples.forEach((path, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Example ${index + 1}`);
    button.append(Object.assign(new Image(), { src: path, alt: "" }));
    button.onclick = async () => {
      const response = await fetch(path, { cache: "force-cache" }).catch(() => null);
      if (response?.ok) choose(await response.blob());
      else say("The example cannot be loaded.");
    };
    $("examples").append(button);
  });
}

function connectControls() {
  $("file").onchange = ({ target }) => {
    choose(target.files[0]);
    target.value = ""; // the same file can be chosen again
  };
  $("camera").onclick = () => (stream ? stopCamera() : startCamera());
  $("opacity").oninput = $("boundaries").oninput = () => requestAnimationFrame(draw);
  $("fit").onchange = () => {
    const file = pending ?? last;
    if (!stream && file) segment(file);
  };
  $("backend").onchange = ({ target }) => {
    pending ??= stream ? null : last;
    startEngine(target.value);
    if (stream) nextFrame();
  };
  $("save-mask").onclick = async () => save(await encodeMask(shown), "mask.png");
  $("save-overlay").onclick = () => $("picture").toBlob((blob) => save(blob, "picture.png"));
  const stage = $("stage");
  for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
    addEventListener(type, (event) => {
      event.preventDefault();
      stage.classList.toggle("drop", type === "dragenter" || type === "dragover");
      if (type === "drop") choose(event.dataTransfer.files[0]);
    });
  }
}

/* Chooses WebGPU if the browser has it on a real GPU. */
async function chooseBackend() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  for (const backend of adapter ? ["webgpu", "wasm"] : ["wasm"]) $("backend").append(new Option(NAMES[backend], backend));
  const isFallback = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
  return adapter && !isFallback ? "webgpu" : "wasm";
}

if (location.protocol === "file:") {
  $("notice").hidden = false;
  $("notice").textContent = "A browser loads the network only from a web server. In the folder of this page, run\npython -m http.server\nand open http://localhost:8000";
} else {
  const size = config.size ? `${config.size[0]} × ${config.size[1]} pixels (height × width)` : "images of any size";
  const bytes = config.bytes < 1e6 ? `${Math.ceil(config.bytes / 1e3)} kB` : `${(config.bytes / 1e6).toFixed(1)} MB`;
  $("facts").textContent = [config.network, `${config.classes.length} classes`, size, config.precision, bytes].filter(Boolean).join(" · ");
  $("fit").value = config.fit;
  $("main").hidden = false;
  showExamples();
  showClasses();
  connectControls();
  startEngine(await chooseBackend());
}
