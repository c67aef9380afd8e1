"use strict";
// The same steps as train/audio.py and train/score.py: first channel, torchaudio's resampler,
// windows of 7.68 s, their mean.
const RATE = 16000, WINDOW = 122880, HOP = 16000, FADE = 800;
const WORDS = ["bad", "poor", "fair", "good", "excellent"];
const REPEATS = document.body.dataset.padding === "repeat";
const [LOBES, EDGE] = document.body.dataset.resampler === "sharp" ? [64, 0.9475937] : [6, 0.99];
const at = (id) => document.getElementById(id);

// ---------------------------------------------------------------- the network, in a worker

async function unpacked(id) { // base64 of gzip
  const bytes = Uint8Array.from(atob(at(id).textContent.trim()), (c) => c.charCodeAt(0));
  at(id).remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const WORKER = `

let session;
self.onmessage = async ({ data }) => {
  try {
    if (data.model) {
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmBinary = data.wasm;
      session = await ort.InferenceSession.create(data.model, { executionProviders: ["wasm"] });
      self.postMessage({ ready: true });
    } else {
      const waves = new ort.Tensor("float32", data.window, [1, data.window.length]);
      const found = await session.run({ waves });
      self.postMessage({ mos: found.mos.data[0] });
    }
  } catch (error) { self.postMessage({ error: String(error && error.message || error) }); }
};`;

class Network {
  async load() {
    const script = new TextDecoder().decode(await unpacked("runtime-js"));
    const [wasm, model] = [await unpacked("runtime-wasm"), await unpacked("model")];
    const url = URL.createObjectURL(new Blob([script, WORKER], { type: "text/javascript" }));
    this.worker = new Worker(url);
    await this.ask({ wasm, model: new Uint8Array(model) });
  }
  ask(message) {
    return new Promise((done, failed) => {
      this.worker.onmessage = ({ data }) => data.error ? failed(new Error(data.error)) : done(data);
      this.worker.onerror = (event) => failed(new Error(event.message || "the worker did not start"));
      this.worker.postMessage(message);
    });
  }
  async score(window) { return (await this.ask({ window })).mos; }
}

// ---------------------------------------------------------------- audio

const text = (bytes, start, length) => String.fromCharCode(...bytes.subarray(start, start + length));

function ownRate(bytes) { // Hz, so that the browser decodes without resampling; null if not known
  const view = new DataView(bytes.buffer);
  if (text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 4) === "WAVE") {
    for (let place = 12; place + 16 <= bytes.length;) {
      if (text(bytes, place, 4) === "fmt ") return view.getUint32(place + 12, true);
      place += 8 + view.getUint32(place + 4, true) + view.getUint32(place + 4, true) % 2;
    }
  }
  if (text(bytes, 0, 4) === "fLaC") return view.getUint32(18) >>> 12;
  if (text(bytes, 0, 4) === "OggS") {
    if (text(bytes, 28, 8) === "OpusHead") return 48000;
    if (text(bytes, 29, 6) === "vorbis") return view.getUint32(40, true);
    if (text(bytes, 29, 4) === "FLAC") return view.getUint32(28 + 9 + 8 + 10) >>> 12;
  }
  return mp3Rate(bytes, view);
}

function mp3Rate(bytes, view) {
  let place = 0;
  if (text(bytes, 0, 3) === "ID3") {
    place = 10 + (bytes[6] << 21 | bytes[7] << 14 | bytes[8] << 7 | bytes[9]);
  }
  if (place + 4 > bytes.length || (view.getUint16(place) & 0xffe6) !== 0xffe2) return null;
  const rate = [44100, 48000, 32000][bytes[place + 2] >> 2 & 3];
  return rate && rate / [4, 0, 2, 1][bytes[place + 1] >> 3 & 3];
}

async function decoded(buffer) { // {wave, rate}: the first channel
  const rate = ownRate(new Uint8Array(buffer)) || 48000;
  let context;
  try { context = new OfflineAudioContext(1, 1, rate); }
  catch { throw new Error(`this browser cannot open recordings at ${rate} Hz`); }
  let audio;
  try { audio = await context.decodeAudioData(buffer); }
  catch { throw new Error("not a recording that this browser can decode; try WAV or FLAC"); }
  if (!audio.length) throw new Error("the recording has no samples");
  const wave = audio.getChannelData(0);
  if (!wave.every(Number.isFinite)) throw new Error("the recording holds samples that are not finite");
  return { wave, rate };
}

const divisor = (a, b) => b ? divisor(b, a % b) : a;

function resampled(wave, rate) { // torchaudio.transforms.Resample, as train/audio.py has it
  if (rate === RATE) return wave;
  const common = divisor(rate, RATE), from = rate / common, to = RATE / common;
  const base = Math.min(from, to) * EDGE, width = Math.ceil(LOBES * from / base);
  const out = new Float32Array(Math.ceil(to * wave.length / from));
  for (let phase = 0; phase < Math.min(to, out.length); phase++) {
    const taps = [], first = -width;
    for (let k = -width; k < width + from; k++) {
      const t = (k / from - phase / to) * base;
      const inside = Math.abs(t) < LOBES;
      const sinc = t === 0 ? 1 : Math.sin(Math.PI * t) / (Math.PI * t);
      taps.push(inside ? sinc * Math.cos(t * Math.PI / LOBES / 2) ** 2 * base / from : 0);
    }
    const begin = taps.findIndex((tap) => tap !== 0);
    const end = taps.length - [...taps].reverse().findIndex((tap) => tap !== 0);
    for (let n = phase, start = first; n < out.length; n += to, start += from) {
      let sum = 0;
      for (let k = begin; k < end; k++) {
        const place = start + k;
        if (place >= 0 && place < wave.length) sum += taps[k] * wave[place];
      }
      out[n] = sum;
    }
  }
  return out;
}

function starts(length) { // samples at which the windows begin
  const spare = length - WINDOW;
  if (spare <= 0) return [0];
  const count = Math.ceil(spare / HOP) + 1, step = 1 / (count - 1);
  return Array.from({ length: count }, (_, i) => Math.trunc((i === count - 1 ? 1 : i * step) * spare));
}

function windowAt(wave, start) { // behind a short recording zeros, or the recording again
  let part = wave.subarray(start, start + WINDOW);
  while (REPEATS && part.length && part.length < WINDOW) part = twice(part);
  const window = new Float32Array(WINDOW);
  window.set(part.subarray(0, WINDOW));
  return window;
}

function twice(wave) { // its end goes over into its beginning, at equal power (data_specs/io/waves.py)
  const length = wave.length, fade = Math.min(FADE, length >> 1), out = new Float32Array(2 * length - fade);
  out.set(wave);
  out.set(wave.subarray(fade), length);
  let before = 0, after = 0, both = 0;
  for (let i = 0; i < fade; i++) {
    const end = wave[length - fade + i], begin = wave[i];
    before += end * end;
    after += begin * begin;
    both += end * begin;
  }
  const energy = Math.sqrt(before * after);
  const alike = energy ? Math.round(Math.max(0, both) / energy * 100) / 100 : 0;
  for (let i = 0; i < fade; i++) {
    const angle = (i + 0.5) / fade * Math.PI / 2;
    const sum = wave[length - fade + i] * Math.cos(angle) + wave[i] * Math.sin(angle);
    out[length - fade + i] = sum / Math.sqrt(1 + alike * Math.sin(2 * angle));
  }
  return out;
}

// ---------------------------------------------------------------- what is shown

const W = 760, H = 300, LEFT = 46, RIGHT = 14, TOP = 14, BOTTOM = 46;

function clock(seconds, step) {
  if (step < 60) return step < 1 ? seconds.toFixed(1) : String(Math.round(seconds));
  return `${Math.floor(seconds / 60)}:${String(Math.round(seconds % 60)).padStart(2, "0")}`;
}

function tickStep(seconds, most) {
  const steps = [.1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 3600, 7200];
  return steps.find((step) => seconds / step <= most) || seconds;
}

function waveShape(wave, x, middle, height) { // the recording's outline, as one path
  const columns = 300, size = Math.max(1, wave.length / columns);
  const peaks = Array.from({ length: columns }, (_, c) => {
    let peak = 0;
    for (let n = Math.floor(c * size); n < Math.min(wave.length, (c + 1) * size); n++) {
      peak = Math.max(peak, Math.abs(wave[n]));
    }
    return peak;
  });
  const loudest = Math.max(...peaks, 1e-9);
  const edge = (sign) => peaks.map((p, c) =>
    `${x((c + .5) * size / RATE).toFixed(1)},${(middle - sign * p / loudest * height).toFixed(1)}`);
  return `M${edge(1).join("L")}L${edge(-1).reverse().join("L")}Z`;
}

function drawing(wave, points, mean, narrow) {
  const seconds = wave.length / RATE, width = narrow ? 420 : W;
  const x = (s) => LEFT + s / seconds * (width - LEFT - RIGHT);
  const y = (mos) => TOP + (5 - mos) / 4 * (H - TOP - BOTTOM);
  const parts = [`<path class="wave" d="${waveShape(wave, x, y(3), y(1) - y(3))}"/>`];
  for (let mos = 1; mos <= 5; mos++) {
    parts.push(`<line class="grid" x1="${LEFT}" x2="${width - RIGHT}" y1="${y(mos)}" y2="${y(mos)}"/>`,
      `<text x="${LEFT - 10}" y="${y(mos) + 4.5}" text-anchor="end">${mos}</text>`);
  }
  const step = tickStep(seconds, narrow ? 5 : 9);
  for (let s = 0; s <= seconds + 1e-9; s += step) {
    parts.push(`<text x="${x(s)}" y="${H - BOTTOM + 20}" text-anchor="middle">${clock(s, step)}</text>`);
  }
  const unit = step < 60 ? "time (s)" : "time (min:s)", middle = (LEFT + width - RIGHT) / 2;
  parts.push(`<text x="${middle}" y="${H - 6}" text-anchor="middle">${unit}</text>`,
    `<text transform="translate(12 ${y(3)}) rotate(-90)" text-anchor="middle">score (MOS)</text>`);
  const line = points.length > 1 ? points : [{ s: 0, mos: mean }, { s: seconds, mos: mean }];
  if (points.length > 1) {
    parts.push(`<line class="mean" x1="${LEFT}" x2="${width - RIGHT}" y1="${y(mean)}" y2="${y(mean)}"/>`);
  }
  parts.push(`<path class="curve" d="M${line.map((p) => `${x(p.s).toFixed(2)},${y(p.mos).toFixed(2)}`).join("L")}"/>`);
  if (points.length > 1 && points.length < 40) {
    for (const p of points) {
      parts.push(`<circle class="dot" cx="${x(p.s).toFixed(2)}" cy="${y(p.mos).toFixed(2)}" r="3.5"><title>` +
        `${p.s.toFixed(1)} s: ${p.mos.toFixed(2)}</title></circle>`);
    }
  }
  return `<svg viewBox="0 0 ${width} ${H}" role="img" aria-labelledby="over-time caption">${parts.join("")}</svg>`;
}

let shown = null;

function draw() {
  if (shown) at("curve").innerHTML = drawing(shown.wave, shown.points, shown.mean, innerWidth < 560);
}

function show(name, wave, points, mean) {
  const seconds = wave.length / RATE, level = Math.min(5, Math.max(1, Math.round(mean)));
  const duration = seconds < 60 ? `${seconds.toFixed(1)} s` : `${clock(seconds, 60)} min`;
  at("score").innerHTML = `${mean.toFixed(2)}<small>of 5</small>`;
  at("score").dataset.mos = mean;
  at("score").dataset.windows = JSON.stringify(points);
  at("word").textContent = `People would call it “${WORDS[level - 1]}”`;
  at("file").textContent = `${name} · ${duration}`;
  document.querySelectorAll(".scale li").forEach((li, i) => li.classList.toggle("here", i + 1 === level));
  at("caption").textContent = points.length > 1
    ? "Each point is a window of 7.68 s, placed at its middle; dashed: their mean. Grey: the recording."
    : "The recording fits one window of 7.68 s, so it has one score. Grey: the recording.";
  shown = { wave, points, mean };
  at("result").hidden = false;
  draw();
}

// ---------------------------------------------------------------- what happens

const network = new Network();
const loaded = network.load();
let busy = false;

function say(message) { at("status").innerHTML = ""; at("status").append(message); }
function fail(message) { say(""); at("error").textContent = message; at("error").hidden = false; }

async function scored(wave) { // [{s: the window's middle in seconds, mos}]
  const points = [], places = starts(wave.length);
  at("progress").hidden = false;
  at("progress").value = 0;
  for (const [i, start] of places.entries()) {
    say(`Listening: window ${i + 1} of ${places.length} …`);
    const middle = (start + Math.min(WINDOW, wave.length - start) / 2) / RATE;
    points.push({ s: middle, mos: await network.score(windowAt(wave, start)) });
    at("progress").value = (i + 1) / places.length;
  }
  return points;
}

async function take(file) {
  if (!file || busy) return;
  busy = true;
  at("error").hidden = at("result").hidden = true;
  try {
    say("Loading the network …");
    await loaded;
    say("Decoding …");
    const { wave, rate } = await decoded(await file.arrayBuffer());
    const heard = resampled(wave, rate), points = await scored(heard);
    show(file.name, heard, points, points.reduce((sum, p) => sum + p.mos, 0) / points.length);
    if (at("audio").src) URL.revokeObjectURL(at("audio").src);
    at("audio").src = URL.createObjectURL(file);
    say("");
  } catch (error) { fail(`${file.name}: ${error.message}`); }
  at("progress").hidden = true;
  busy = false;
}

at("picker").addEventListener("change", () => { take(at("picker").files[0]); at("picker").value = ""; });
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => { event.preventDefault(); at("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  addEventListener(kind, (event) => { event.preventDefault(); at("drop").classList.remove("over"); });
}
addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
addEventListener("resize", draw);
loaded.then(() => { if (!busy) say(""); document.body.dataset.ready = "yes"; },
  (error) => fail(`The network could not be loaded: ${error.message}`));
