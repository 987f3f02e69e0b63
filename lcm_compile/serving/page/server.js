// The server: its models, the key, whether it is there, and the streams of pictures.

const KEY = "lcm-compile.key";
const FIRST_PAUSE = 500; // milliseconds before the first try to reach a server that is gone; then it doubles
const LAST_PAUSE = 15_000;
const PATIENCE = 8_000; // milliseconds in which the server must answer a question

const url = (path) => new URL(path, document.baseURI);

/** Keeps the key for this tab alone; null forgets it. */
export function setKey(key) {
  if (key === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, key);
}

/** Returns the headers that carry the key: as a password, which may hold any letter. */
export function keyHeaders() {
  const key = sessionStorage.getItem(KEY);
  if (key === null) return {};
  return { Authorization: `Basic ${btoa(String.fromCharCode(...new TextEncoder().encode(`:${key}`)))}` };
}

/** Takes the key out of the address, so that no one reads it there. Returns whether there was one. */
export function takeKeyFromAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const key = fields.get("key");
  if (key === null) return false;
  setKey(key);
  fields.delete("key");
  history.replaceState(null, "", fields.size ? `#${fields}` : location.pathname + location.search);
  return true;
}

/**
 * Whether the server is there. `changed` is called with each new state:
 * connecting, ready, loading (it is there, and pictures will come), key (it wants one) or lost.
 */
export class Server {
  constructor(changed) {
    this.changed = changed;
    this.state = "connecting";
    this.models = [];
    this.why = "";
    this.triesAt = 0;
    this.pause = 0;
    this.timer = 0;
    const retry = () => this.state === "lost" && !document.hidden && this.connect();
    window.addEventListener("online", retry);
    document.addEventListener("visibilitychange", retry);
  }

  get isThere() {
    return this.state === "ready" || this.state === "loading";
  }

  /** Asks for the models, and whether they are loaded. */
  async connect() {
    clearTimeout(this.timer);
    let answer, ready;
    try {
      [answer, ready] = await Promise.all([
        fetch(url("v1/models"), { headers: keyHeaders(), cache: "no-store", signal: AbortSignal.timeout(PATIENCE) }),
        fetch(url("ready"), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) }),
      ]);
      if (answer.ok) this.models = (await answer.json()).data;
      else this.why = (await answer.json()).error.message;
    } catch {
      this.why = "it does not answer";
      this.lose();
      return;
    }
    if (answer.status === 401) {
      this.set("key");
    } else if (!answer.ok) {
      this.lose();
    } else {
      this.pause = 0;
      if (!ready.ok) this.timer = setTimeout(() => this.connect(), 1000);
      this.set(ready.ok ? "ready" : "loading");
    }
  }

  /** Tries again after a pause that grows. */
  lose() {
    clearTimeout(this.timer);
    this.pause = Math.min(Math.max(2 * this.pause, FIRST_PAUSE), LAST_PAUSE);
    this.triesAt = Date.now() + this.pause;
    this.timer = setTimeout(() => this.connect(), this.pause);
    this.set("lost");
  }

  /** Takes that a stream was closed: the first of several tells. */
  lostStream() {
    if (!this.isThere) return;
    this.why = "the connection was closed";
    this.lose();
  }

  set(state) {
    this.state = state;
    this.changed();
  }
}

/**
 * A stream of pictures. What is wanted is sent at once, and the server draws the latest. `drawn` is called with
 * (what was wanted, what the server tells, the picture's file), and `failed` with an error in words.
 */
export class Stream {
  constructor(server, drawn, failed) {
    this.drawn = drawn;
    this.failed = failed;
    this.count = 0;
    this.answered = 0;
    this.image = null;
    this.asked = new Map();
    this.waiting = [];
    const address = url("live");
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address, ["lcm-compile", ...keyProtocols()]);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.waiting.splice(0).forEach((part) => this.socket.send(part));
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = () => server.lostStream();
  }

  /** How many of the latest pictures are not drawn yet. */
  get pending() {
    return this.count - this.answered;
  }

  /** Asks for a picture; `image` is a Blob that it begins at, or null. */
  ask(wanted, image) {
    if (image !== null && image !== this.image) this.send(image);
    this.image = image ?? this.image;
    const id = ++this.count;
    this.asked.set(id, { wanted, image, at: performance.now() });
    this.send(JSON.stringify({ ...wanted, id, image: image !== null }));
  }

  send(part) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(part);
    else if (this.socket.readyState === WebSocket.CONNECTING) this.waiting.push(part);
  }

  take(data) {
    const isText = typeof data === "string";
    const length = isText ? 0 : new DataView(data).getUint32(0);
    const facts = JSON.parse(isText ? data : new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const asked = this.asked.get(facts.id);
    this.answered = Math.max(this.answered, facts.id);
    for (const id of this.asked.keys()) if (id <= facts.id) this.asked.delete(id);
    if (isText) {
      this.failed(facts.error);
    } else if (asked) {
      const file = new Blob([new Uint8Array(data, 4 + length)], { type: `image/${facts.format}` });
      this.drawn({ ...facts, ...asked, roundTrip: performance.now() - asked.at, file });
    }
  }

  close() {
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
  }
}

/** Returns the key as a WebSocket's subprotocol: browsers send it no header. */
function keyProtocols() {
  const key = sessionStorage.getItem(KEY);
  if (key === null) return [];
  const bytes = new TextEncoder().encode(key);
  return [`lcm-compile.key.${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`];
}
