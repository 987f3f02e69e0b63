// A pane: one model, its settings, and the picture that it draws.

import { announce, download, fill, labelled, options, slider } from "./dom.js";
import { Stream } from "./server.js";
import { fileName, linkOf } from "./settings.js";

const FEW_STEP = ["lcm", "tcd"];
const SMALL = 256 * 256; // pixels up to which pictures come as PNG: enlarged, one would see what JPEG leaves out
const ENLARGED = 2.5; // from how many times a picture's size on its pixels are shown as they are
const LEAST_SHOWN = 0.05; // milliseconds; what is known already, such as the same prompt's text, takes none
const STAGES = ["waited", "encode", "context", "encode-image", "step", "decode"];

/** A model and its picture. `page` has what panes share: prompt, negative, seed, source, strength, server. */
export class Pane {
  constructor(page, saved) {
    this.page = page;
    this.stream = null;
    this.picture = null; // the last one: {wanted, image, seed, size, format, ms, roundTrip, file}
    this.times = [];
    this.missing = []; // what the settings name that is not here
    this.loras = {}; // the sliders of LoRAs by name
    this.root = fill("pane");
    this.canvas = this.find(".picture");
    this.model = this.choice("Model", () => { this.showModel(null); this.changed(); });
    this.find(".heading").prepend(this.model.row);
    this.size = this.choice("Size", () => { page.resized(); this.changed(); });
    this.steps = slider("Steps", { min: 1, max: 8, step: 1, value: 4 }, () => this.changed());
    this.guidance = slider("Guidance", { min: 0, max: 4, step: 0.1, value: 1 }, () => this.changed());
    this.sampler = this.choice("Sampler", () => this.changed());
    this.more = this.choice("LoRA to add", () => this.addFile());
    this.sliders = document.createElement("div");
    this.find(".controls").append(this.size.row, this.steps.row, this.guidance.row, this.sampler.row, this.sliders, this.more.row);
    this.find(".remove").onclick = () => page.remove(this);
    this.find(".keep").onclick = () => page.keep(this.picture);
    this.find(".download").onclick = () => download(this.picture.file, fileName(this.settingsDrawn, this.picture.format));
    this.find(".link").onclick = ({ target }) => page.copyLink(target, linkOf(this.settingsDrawn));
    new ResizeObserver(() => this.enlarge()).observe(this.canvas);
    this.showModels(saved);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  choice(label, changed) {
    const select = document.createElement("select");
    select.addEventListener("change", changed);
    return labelled(label, select);
  }

  // The model and its settings.

  get facts() {
    return this.page.server.models.find((model) => model.id === this.model.control.value);
  }

  /** Width and height of the pictures. */
  get sides() {
    return this.size.control.value.split("x").map(Number);
  }

  /** Shows the models that the server has, and settings: saved ones, or else those that are there. */
  showModels(saved = this.facts ? this.own : null) {
    const names = this.page.server.models.map((model) => model.id);
    options(this.model.control, names, saved?.model);
    this.showModel(saved);
    this.missing = saved && this.facts ? this.missingOf(saved) : [];
  }

  /** Returns what saved settings name that the server has not, in words. */
  missingOf(saved) {
    const { id, sizes, samplers, loras, files } = this.facts;
    const others = Object.keys(saved.loras ?? {}).filter((name) => !(name in loras) && !files.includes(name));
    return [
      ...(saved.model && saved.model !== id ? [`model ${saved.model}`] : []),
      ...(saved.size && !sizes.includes(saved.size) ? [`size ${saved.size}`] : []),
      ...(saved.sampler && !samplers.includes(saved.sampler) ? [`sampler ${saved.sampler}`] : []),
      ...others.map((name) => `LoRA ${name}`),
    ];
  }

  /** Shows what the chosen model takes, with its own settings where none are saved. */
  showModel(saved) {
    const facts = this.facts;
    if (!facts) return;
    options(this.size.control, facts.sizes, saved?.size);
    this.size.row.hidden = facts.sizes.length === 1;
    const isFewStep = FEW_STEP.includes(facts.sampler);
    this.steps.control.max = isFewStep ? Math.max(8, facts.steps) : Math.max(50, facts.steps);
    this.guidance.control.max = isFewStep ? Math.max(4, facts.guidance_scale) : 15;
    this.steps.set(saved?.steps ?? facts.steps);
    this.guidance.set(saved?.guidance_scale ?? facts.guidance_scale);
    options(this.sampler.control, facts.samplers, saved?.sampler ?? facts.sampler);
    this.loras = {};
    this.sliders.replaceChildren();
    for (const [name, weight] of Object.entries(facts.loras)) this.addLora(name, saved?.loras?.[name] ?? weight);
    for (const [name, weight] of Object.entries(saved?.loras ?? {})) {
      if (facts.files.includes(name)) this.addLora(name, weight, true);
    }
    this.offerFiles();
    this.page.resized();
  }

  addLora(name, weight, isFile = false) {
    const lora = slider(name, { min: -1, max: 2, step: 0.05, value: weight }, () => this.changed());
    this.loras[name] = { ...lora, isFile };
    this.sliders.append(lora.row);
    if (!isFile) return;
    const remove = document.createElement("button");
    Object.assign(remove, { type: "button", className: "quiet", textContent: "×", title: `Remove ${name}` });
    remove.setAttribute("aria-label", `Remove ${name}`);
    remove.onclick = () => {
      delete this.loras[name];
      lora.row.remove();
      this.offerFiles();
      this.more.control.focus();
      this.changed();
    };
    lora.row.append(remove);
  }

  /** Puts the chosen file of the LoRA folder into a slot. */
  addFile() {
    const name = this.more.control.value;
    if (!this.facts.files.includes(name)) return;
    this.addLora(name, 1, true);
    this.offerFiles();
    this.loras[name].control.focus();
    this.changed();
  }

  offerFiles() {
    const used = Object.values(this.loras).filter((lora) => lora.isFile).length;
    const left = this.facts.files.filter((name) => !this.loras[name]);
    options(this.more.control, ["", ...left], "");
    this.more.row.hidden = used >= this.facts.slots || left.length === 0;
  }

  /** The settings of this pane alone. */
  get own() {
    const loras = Object.entries(this.loras)
      .map(([name, lora]) => [name, lora.control.valueAsNumber, lora.isFile])
      .filter(([, weight, isFile]) => weight !== 0 || !isFile);
    return {
      model: this.model.control.value,
      size: this.size.control.value,
      steps: this.steps.control.valueAsNumber,
      guidance_scale: this.guidance.control.valueAsNumber,
      sampler: this.sampler.control.value,
      loras: Object.fromEntries(loras.map(([name, weight]) => [name, weight])),
    };
  }

  /** The settings of the picture that is shown, with the seed that it was drawn with. */
  get settingsDrawn() {
    return { ...this.picture.wanted, seed: this.picture.seed };
  }

  // Drawing.

  changed() {
    this.missing = [];
    this.draw();
    this.page.save();
  }

  /** Draws from what the source shows now. */
  drawFromSource() {
    if (this.facts?.images) this.draw();
    else this.showHint();
  }

  showHint() {
    const isLeftOut = this.page.source.mode !== "noise" && this.facts && !this.facts.images;
    const parts = this.missing.length ? [`Not on this server: ${this.missing.join(", ")}. So the picture is another.`] : [];
    if (isLeftOut) parts.push("This model draws from the prompt alone.");
    this.find(".hint").textContent = parts.join(" ");
    this.find(".hint").hidden = parts.length === 0;
  }

  /** Opens a stream, now that the server is there. */
  open() {
    this.close();
    this.stream = new Stream(
      this.page.server,
      (picture) => this.show(picture),
      (error) => this.tell(error),
    );
    this.draw();
  }

  close() {
    this.stream?.close();
    this.stream = null;
  }

  get isBusy() {
    return this.stream !== null && this.stream.pending > 1;
  }

  /** Asks for the picture of what is set now. */
  draw() {
    if (!this.stream || !this.facts) return;
    const { page } = this;
    const [width, height] = this.sides;
    const wanted = { prompt: page.prompt, negative_prompt: page.negative, seed: page.seed, ...this.own };
    this.showHint();
    let image = null;
    if (page.source.mode !== "noise" && this.facts.images) {
      image = page.source.image;
      if (image === null) return; // there is none yet; it comes
      wanted.strength = page.strength;
    }
    this.stream.ask({ ...wanted, output_format: width * height <= SMALL ? "png" : "jpeg" }, image);
  }

  async show(picture) {
    const bitmap = await createImageBitmap(picture.file);
    if (this.picture?.stream === this.stream && this.picture.id > picture.id) return;
    const { canvas } = this;
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
      this.enlarge();
    }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    delete picture.wanted.output_format;
    this.picture = { ...picture, stream: this.stream };
    this.tell("");
    const total = Math.round(picture.ms.total);
    canvas.setAttribute("aria-label", picture.wanted.prompt || "A picture without a prompt");
    canvas.dataset.count = Number(canvas.dataset.count ?? 0) + 1;
    this.root.querySelectorAll(".actions button").forEach((button) => { button.disabled = false; });
    this.showTimes(picture);
    announce(`Drawn in ${total} milliseconds.`);
  }

  enlarge() {
    this.canvas.classList.toggle("pixels", this.canvas.clientWidth >= ENLARGED * this.canvas.width);
  }

  /** Shows the milliseconds of each stage, as a bar and in words. */
  showTimes({ ms, roundTrip }) {
    const sum = (stage) => [ms[stage] ?? 0].flat().reduce((all, one) => all + one, 0);
    const parts = STAGES.filter((stage) => sum(stage) >= LEAST_SHOWN);
    const bar = this.find(".bar");
    bar.replaceChildren(...parts.map((stage) => {
      const part = document.createElement("span");
      part.className = stage;
      part.style.flexGrow = sum(stage);
      return part;
    }));
    const now = performance.now();
    this.times = [...this.times, now].filter((time) => now - time < 1000);
    const words = parts.map((stage) => {
      const span = document.createElement("span");
      span.className = stage;
      const count = Array.isArray(ms[stage]) ? ms[stage].length : 0;
      const name = { step: count === 1 ? "1 step" : `${count} steps`, "encode-image": "image" }[stage] ?? stage;
      span.textContent = `${name} ${sum(stage).toFixed(1)}`;
      return span;
    });
    const total = document.createElement("strong");
    total.textContent = `${ms.total.toFixed(0)} ms`;
    const rest = document.createElement("span");
    rest.textContent = this.times.length > 3 ? `${this.times.length} pictures/s` : `shown after ${roundTrip.toFixed(0)} ms`;
    this.find(".ms").replaceChildren(total, ...words, rest);
  }

  tell(error) {
    this.find(".error").textContent = error;
    this.find(".error").hidden = !error;
    this.root.classList.toggle("failed", Boolean(error));
  }
}
