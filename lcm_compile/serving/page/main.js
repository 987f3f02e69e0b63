// The page: what is drawn is what stands in it, always.

import { announce, slider } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Pane } from "./pane.js";
import { Server, setKey, takeKeyFromAddress } from "./server.js";
import { fromFragment } from "./settings.js";
import { Source } from "./source.js";

const SAVED = "lcm-compile.page"; // what is typed and set, for a reload of this tab
const STATES = {
  connecting: "connecting…",
  ready: "ready",
  loading: "the models are loading",
  key: "waits for the key",
  lost: "server lost",
};
const $ = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.panes = [];
    this.saved = JSON.parse(sessionStorage.getItem(SAVED) ?? "{}");
    this.strengthSlider = slider("Strength", { min: 0, max: 1, step: 0.05, value: 0.6 }, () => this.changed());
    $("strength").append(this.strengthSlider.row);
    this.server = new Server(() => this.showServer());
    this.source = new Source(() => this.panes.forEach((pane) => pane.drawFromSource()), () => this.panes.some((pane) => pane.isBusy));
    this.gallery = new Gallery(this);
    $("prompt").addEventListener("input", () => { this.growPrompt(); this.changed(); });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.panes.forEach((pane) => this.keep(pane.picture));
    });
    $("negative").addEventListener("input", () => this.changed());
    $("seed").addEventListener("input", () => this.changed());
    $("dice").onclick = () => {
      $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
      this.changed();
    };
    $("add-pane").onclick = () => this.add();
    $("try-now").onclick = () => this.server.connect();
    document.querySelectorAll("[name=source]").forEach((radio) => {
      radio.onchange = () => { this.source.choose(radio.value); this.resized(); };
    });
    $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      setKey($("key").value);
      this.server.connect();
    });
    window.addEventListener("hashchange", () => {
      if (takeKeyFromAddress()) this.server.connect();
      const settings = fromFragment(location.hash);
      if (settings && this.panes.length) this.drawAgain(settings, null);
    });
    window.addEventListener("resize", () => this.growPrompt());
    setInterval(() => this.countDown(), 250);
  }

  async start() {
    takeKeyFromAddress();
    const linked = fromFragment(location.hash);
    const { prompt = "", negative = "", seed = 7, strength = 0.6, panes = [] } = this.saved;
    Object.assign(this, { wantedPanes: linked ? [linked] : panes });
    $("prompt").value = linked?.prompt ?? prompt;
    $("negative").value = linked ? linked.negative_prompt ?? "" : negative;
    $("seed").value = linked ? linked.seed ?? "" : seed;
    this.strengthSlider.set(linked?.strength ?? strength);
    this.growPrompt();
    this.gallery.open();
    await this.server.connect();
  }

  // What is asked for, by all panes.

  get prompt() { return $("prompt").value; }
  get negative() { return $("negative").value || null; }
  get strength() { return this.strengthSlider.control.valueAsNumber; }

  /** The seed, or null for another one each time. */
  get seed() {
    const input = $("seed");
    return input.value === "" || !input.checkValidity() ? null : Number(input.value);
  }

  /** Draws what now stands in the page, which is no longer that of the link in the address. */
  changed() {
    if (location.hash) history.replaceState(null, "", location.pathname + location.search);
    this.draw();
    this.save();
  }

  draw() {
    this.panes.forEach((pane) => pane.draw());
  }

  save() {
    const { prompt, negative, strength } = this;
    const panes = this.panes.map((pane) => pane.own);
    const saved = { prompt, negative: negative ?? "", seed: $("seed").value, strength, panes };
    sessionStorage.setItem(SAVED, JSON.stringify(saved));
  }

  growPrompt() {
    $("prompt").style.height = "auto";
    $("prompt").style.height = `${$("prompt").scrollHeight}px`;
  }

  /** Gives the paper the proportions of the first pane that draws from it. */
  resized() {
    const pane = this.panes.find((one) => one.facts?.images);
    if (pane) this.source.resize(pane.sides);
    const hasImages = this.server.models.some((model) => model.images);
    $("no-images").hidden = hasImages || !this.server.isThere;
    document.querySelectorAll("[name=source]").forEach((one) => { one.disabled = !hasImages && one.value !== "noise"; });
  }

  // Panes.

  add(saved = null) {
    const shown = new Set(this.panes.map((pane) => pane.model.control.value));
    const other = this.server.models.find((model) => !shown.has(model.id));
    const last = this.panes.at(-1)?.own ?? null;
    const pane = new Pane(this, saved ?? (other ? { model: other.id } : last));
    this.panes.push(pane);
    $("panes").append(pane.root);
    this.showCount();
    if (this.server.isThere) pane.open();
    if (saved === null) {
      pane.model.control.focus();
      this.save();
    }
  }

  remove(pane) {
    pane.close();
    pane.root.remove();
    this.panes = this.panes.filter((one) => one !== pane);
    this.showCount();
    this.resized();
    this.save();
    $("add-pane").focus();
  }

  showCount() {
    $("panes").classList.toggle("single", this.panes.length === 1);
    this.panes.forEach((pane, i) => pane.root.setAttribute("aria-label", `Model ${i + 1} of ${this.panes.length}`));
    this.resized();
  }

  // Pictures that were drawn.

  keep(picture) {
    if (!picture) return;
    const { wanted, seed, ms, format, file, image } = picture;
    this.gallery.keep({ settings: { ...wanted, seed }, ms, format, file, image });
  }

  /** Puts settings into the page and its first pane, which draws them; `image` is what the picture began at. */
  async drawAgain(settings, image) {
    $("prompt").value = settings.prompt;
    $("negative").value = settings.negative_prompt ?? "";
    $("seed").value = settings.seed ?? "";
    if (settings.strength !== undefined) this.strengthSlider.set(settings.strength);
    this.growPrompt();
    this.panes[0].showModels({ ...settings });
    const mode = image ? "drawing" : "noise";
    document.querySelector(`[name=source][value=${mode}]`).checked = true;
    await this.source.choose(mode, image);
    this.save();
    this.panes[0].root.scrollIntoView({ block: "nearest" });
  }

  async copyLink(button, link) {
    const words = button.textContent;
    try {
      await navigator.clipboard.writeText(link);
      button.textContent = "Copied";
      announce("The link is copied.");
    } catch {
      window.prompt("The link that draws it again:", link);
    }
    setTimeout(() => { button.textContent = words === "Copied" ? "Copy link" : words; }, 1500);
  }

  // The server.

  showServer() {
    const { server } = this;
    const before = $("status").dataset.state;
    if (before !== server.state) $("status").textContent = STATES[server.state];
    $("status").dataset.state = document.body.dataset.state = server.state;
    $("notice").hidden = server.state !== "lost";
    if (server.state === "lost" && before !== "lost") {
      $("notice-words").textContent = `The server is gone: ${server.why}. What you typed is kept, and is drawn when it is back.`;
    }
    const dialog = $("key-dialog");
    if (server.state === "key") {
      $("key-error").textContent = server.why;
      $("key-error").hidden = !$("key").value;
      if (!dialog.open) dialog.showModal();
      $("key").select();
    } else if (dialog.open) {
      dialog.close();
      $("prompt").focus();
    }
    if (!server.isThere) {
      this.panes.forEach((pane) => pane.close());
    } else if (before !== "ready" && before !== "loading") {
      this.showModels();
    }
    this.countDown();
  }

  /** Shows the models that the server has, now that it is there, and draws. */
  showModels() {
    if (this.panes.length === 0) {
      if (!$("prompt").value && !this.saved.panes) $("prompt").value = this.server.models[0].prompt;
      this.growPrompt();
      const wanted = this.wantedPanes.length ? this.wantedPanes : [{}];
      wanted.forEach((saved) => this.add(saved));
    } else {
      this.panes.forEach((pane) => { pane.showModels(); pane.open(); });
    }
  }

  countDown() {
    const seconds = Math.ceil((this.server.triesAt - Date.now()) / 1000);
    $("countdown").textContent = seconds > 0 ? `Trying again in ${seconds} s.` : "Trying…";
  }
}

new Page().start();
