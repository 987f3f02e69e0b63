// The picture that others begin at: a drawing, or what a webcam sees.

import { make } from "./dom.js";

const COLOURS = ["white", "black", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink"];
const LONG_SIDE = 512; // pixels of the drawing itself; what is sent has a model's size
const MOST_UNDONE = 20;
const KEY_STEP = 0.04; // of the drawing's width, for a press of an arrow key
const SMALL = 256 * 256; // pixels up to which a picture is sent as a PNG: it is small then, and exact

const $ = (id) => document.getElementById(id);

/**
 * What pictures begin at. `changed` is called when it is another, and `isBusy` tells whether the models still draw
 * from the last one: the webcam waits for them.
 */
export class Source {
  constructor(changed, isBusy) {
    this.changed = changed;
    this.isBusy = isBusy;
    this.mode = "noise";
    this.size = [64, 64];
    this.image = null;
    this.encoding = null;
    this.undone = [];
    this.pen = null; // where the brush is while it draws
    this.cursor = { x: 0.5, y: 0.5 }; // where the arrow keys have moved it, as shares of the sides
    this.canvas = $("drawing");
    this.video = $("webcam");
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.makeTools();
    this.resize(this.size);
    this.fill("white");
    this.undone = [];
  }

  makeTools() {
    const swatch = (name, title) => {
      const radio = make("input", { type: "radio", name: "colour", value: name, checked: name === "red" });
      const dot = make("span", { title });
      dot.style.background = name;
      return make("label", {}, radio, dot, make("span", { className: "unseen" }, title));
    };
    const own = make("input", { type: "color", value: "#c2410c", title: "Another colour", ariaLabel: "Another colour" });
    own.addEventListener("input", () => document.querySelectorAll("[name=colour]").forEach((one) => { one.checked = false; }));
    document.querySelector(".swatches").append(...COLOURS.map((name) => swatch(name, name)), own);
    this.own = own;

    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.begin(this.placeOf(event));
    });
    canvas.addEventListener("pointermove", (event) => this.pen && event.buttons && this.line(this.placeOf(event)));
    canvas.addEventListener("pointerup", () => { this.pen = null; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.showCursor(canvas.matches(":focus-visible")));
    canvas.addEventListener("blur", () => { this.pen = null; this.showCursor(false); });
    $("undo").onclick = () => this.undo();
    $("clear").onclick = () => this.fill(this.colour);
    $("open").onclick = () => $("file").click();
    $("file").onchange = ({ target }) => target.files[0] && this.open(target.files[0]);
  }

  get colour() {
    return document.querySelector("[name=colour]:checked")?.value ?? this.own.value;
  }

  /** Width of the brush in pixels of the drawing. */
  get width() {
    return ($("brush-size").valueAsNumber / 100) * this.canvas.width;
  }

  // The drawing.

  placeOf(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  remember() {
    this.undone.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.undone.length > MOST_UNDONE) this.undone.shift();
  }

  begin(place) {
    this.remember();
    this.pen = place;
    this.line(place);
  }

  line(to) {
    const { context, pen } = this;
    context.strokeStyle = this.colour;
    context.lineWidth = this.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(pen.x, pen.y);
    context.lineTo(to.x + 0.01, to.y); // a line without a length would leave no dot
    context.stroke();
    this.pen = to;
    this.encode();
  }

  fill(colour) {
    this.remember();
    this.context.fillStyle = colour;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.encode();
  }

  undo() {
    const last = this.undone.pop();
    if (last) this.context.putImageData(last, 0, 0);
    this.encode();
  }

  /** Puts a picture's file onto the paper: the middle of it, if it has other proportions. `isExact` sends it itself. */
  async open(file, isExact = false) {
    try {
      const picture = await createImageBitmap(file);
      this.remember();
      cover(this.context, picture, picture.width, picture.height);
      this.tell("");
      if (!isExact) {
        this.encode();
        return;
      }
      this.image = file;
      this.changed();
    } catch {
      this.tell("That file can't be read as a picture.");
    }
  }

  /** Moves the brush by the arrow keys, in smaller steps with Shift. */
  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const place = () => ({ x: this.cursor.x * this.canvas.width, y: this.cursor.y * this.canvas.height });
    if (event.key in moves) {
      const [x, y] = moves[event.key];
      const step = event.shiftKey ? KEY_STEP / 4 : KEY_STEP;
      const inside = (value) => Math.min(Math.max(value, 0), 1);
      this.cursor = { x: inside(this.cursor.x + x * step), y: inside(this.cursor.y + y * step) };
      if (this.pen) this.line(place());
    } else if (event.key === " ") {
      if (this.pen) this.pen = null;
      else this.begin(place());
    } else {
      return;
    }
    event.preventDefault();
    this.showCursor(true);
  }

  showCursor(isShown) {
    const brush = $("brush");
    brush.hidden = !isShown;
    brush.style.left = `${this.cursor.x * 100}%`;
    brush.style.top = `${this.cursor.y * 100}%`;
    brush.classList.toggle("down", this.pen !== null);
  }

  /** Takes the size of the pictures, width and height, whose proportions the paper has. */
  resize([width, height]) {
    this.size = [width, height];
    const scale = LONG_SIDE / Math.max(width, height);
    const sides = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width === sides[0] && this.canvas.height === sides[1]) return;
    const before = make("canvas", { width: this.canvas.width, height: this.canvas.height });
    before.getContext("2d").drawImage(this.canvas, 0, 0);
    [this.canvas.width, this.canvas.height] = sides;
    cover(this.context, before, before.width, before.height);
    this.undone = [];
    this.encode();
  }

  // Which one it is.

  /** Begins pictures at noise, the drawing or the webcam; `image`, a Blob, is put onto the paper first. */
  async choose(mode, image = null) {
    this.mode = mode;
    this.image = null;
    this.tell("");
    $("source").hidden = mode === "noise";
    $("drawing-tools").hidden = this.canvas.hidden = mode !== "drawing";
    this.video.hidden = mode !== "webcam";
    this.video.srcObject?.getTracks().forEach((track) => track.stop());
    this.video.srcObject = null;
    if (mode === "webcam") await this.watch();
    if (image) await this.open(image, true);
    else if (mode === "drawing") this.encode();
    else if (mode === "noise") this.changed();
  }

  async watch() {
    if (!navigator.mediaDevices) {
      this.tell("Browsers give the webcam to pages of https:// and localhost alone.");
      return;
    }
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 }, audio: false });
      if (this.mode !== "webcam") {
        stream.getTracks().forEach((track) => track.stop());
        return;
      }
      this.video.srcObject = stream;
      await this.video.play();
      this.look();
    } catch (error) {
      this.tell(`There is no picture of a webcam: ${error.message}`);
    }
  }

  /** Takes a frame of the webcam once the models have drawn from the last but one. */
  look() {
    if (this.mode !== "webcam" || !this.video.srcObject) return;
    if (!this.isBusy()) this.encode();
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(() => this.look());
    else requestAnimationFrame(() => this.look());
  }

  /** Makes a file of what is there now, in the size that is drawn. Changes meanwhile make one more. */
  async encode() {
    if (this.mode === "noise") return;
    this.isStale = true;
    if (this.encoding) return;
    while (this.isStale) {
      this.isStale = false;
      const [width, height] = this.size;
      const sent = make("canvas", { width, height });
      const context = sent.getContext("2d");
      context.imageSmoothingQuality = "high";
      if (this.mode === "webcam") {
        context.setTransform(-1, 0, 0, 1, width, 0); // a mirror
        cover(context, this.video, this.video.videoWidth, this.video.videoHeight);
      } else {
        cover(context, this.canvas, this.canvas.width, this.canvas.height);
      }
      const mode = this.mode;
      const type = width * height <= SMALL ? "image/png" : "image/jpeg";
      this.encoding = new Promise((done) => sent.toBlob(done, type, 0.92));
      const image = await this.encoding;
      if (mode !== this.mode) continue;
      this.image = image;
      this.changed();
    }
    this.encoding = null;
  }

  tell(text) {
    $("source-error").textContent = text;
    $("source-error").hidden = !text;
  }
}

/** Draws a picture over a whole canvas: the middle of it, without changing its proportions. */
function cover(context, picture, width, height) {
  const canvas = context.canvas;
  const scale = Math.max(canvas.width / width, canvas.height / height);
  const [w, h] = [width * scale, height * scale];
  context.drawImage(picture, (canvas.width - w) / 2, (canvas.height - h) / 2, w, h);
}
