// Pictures that were kept, in this browser's own database, with the settings of each.

import { announce, download, fill } from "./dom.js";
import { fileName, inWords, linkOf } from "./settings.js";

const $ = (id) => document.getElementById(id);

/** Returns a promise of what a request of IndexedDB gives. */
function result(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

/** The pictures that were kept. If the browser has no database for this page, they last as long as the page. */
export class Gallery {
  constructor(page) {
    this.page = page;
    this.database = null;
  }

  async open() {
    try {
      const request = indexedDB.open("lcm-compile", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
      this.database = await result(request);
      for (const kept of await result(this.store("readonly").getAll())) this.show(kept);
    } catch {
      this.database = null;
    }
  }

  store(mode) {
    return this.database.transaction("pictures", mode).objectStore("pictures");
  }

  /** Keeps a picture: {settings, ms, format, file, image}. */
  async keep(kept) {
    if (this.database) {
      try {
        kept.id = await result(this.store("readwrite").add(kept));
      } catch {
        announce("The browser has no room for it: it is kept until the page is closed.");
      }
    }
    this.show(kept);
    announce("Kept.");
  }

  show(kept) {
    const item = fill("kept-picture");
    const { settings } = kept;
    const find = (selector) => item.querySelector(selector);
    const image = find("img");
    image.src = URL.createObjectURL(kept.file);
    image.alt = settings.prompt || "A picture without a prompt";
    image.onload = () => image.classList.toggle("pixels", image.naturalWidth < 128);
    const again = find(".again");
    again.href = linkOf(settings);
    again.title = "Draw it again";
    again.setAttribute("aria-label", `Draw again: ${settings.prompt}`);
    again.onclick = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      history.replaceState(null, "", again.href);
      this.page.drawAgain(settings, kept.image);
    };
    find(".prompt").textContent = settings.prompt;
    find(".facts").textContent = `${inWords(settings)} · ${kept.ms.total.toFixed(0)} ms`;
    find(".download").onclick = () => download(kept.file, fileName(settings, kept.format));
    find(".link").onclick = ({ target }) => this.page.copyLink(target, again.href);
    find(".remove").onclick = () => {
      if (this.database && kept.id !== undefined) this.store("readwrite").delete(kept.id);
      const next = item.nextElementSibling ?? item.previousElementSibling;
      URL.revokeObjectURL(image.src);
      item.remove();
      $("gallery-empty").hidden = $("kept").childElementCount > 0;
      (next?.querySelector(".remove") ?? $("prompt")).focus();
      announce("Removed.");
    };
    $("kept").prepend(item);
    $("gallery-empty").hidden = true;
  }
}
