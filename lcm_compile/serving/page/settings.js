// The settings of a picture, and the link that draws it again.

const TEXTS = ["prompt", "negative_prompt", "model", "size", "sampler"];
const NUMBERS = ["seed", "steps", "guidance_scale", "strength"];

/** Returns the settings as the fragment of a URL, without its #. */
export function toFragment(settings) {
  const fields = new URLSearchParams();
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (settings[name] !== undefined && settings[name] !== null && settings[name] !== "") {
      fields.set(name, settings[name]);
    }
  }
  for (const [name, weight] of Object.entries(settings.loras ?? {})) {
    fields.append("lora", `${name}:${weight}`);
  }
  return fields.toString();
}

/** Returns the settings in a URL's fragment, or null if there are none. What is no setting is left out. */
export function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  if (!fields.has("prompt")) return null;
  const settings = { loras: {} };
  for (const name of TEXTS) if (fields.has(name)) settings[name] = fields.get(name);
  for (const name of NUMBERS) {
    const value = Number(fields.get(name) || NaN);
    if (Number.isFinite(value)) settings[name] = value;
  }
  for (const text of fields.getAll("lora")) {
    const colon = text.lastIndexOf(":");
    const weight = Number(text.slice(colon + 1));
    if (colon > 0 && Number.isFinite(weight)) settings.loras[text.slice(0, colon)] = weight;
  }
  return settings;
}

/** Returns the address of this page with these settings in it. */
export function linkOf(settings) {
  return `${location.origin}${location.pathname}#${toFragment(settings)}`;
}

/** Returns the settings besides the prompt, in words. */
export function inWords(settings) {
  const parts = [settings.model, settings.size?.replace("x", " × "), `seed ${settings.seed}`];
  parts.push(settings.steps === 1 ? "1 step" : `${settings.steps} steps`);
  if (settings.sampler) parts.push(settings.sampler);
  if (settings.guidance_scale !== 1) parts.push(`guidance ${settings.guidance_scale}`);
  if (settings.strength !== undefined) parts.push(`from a picture, strength ${settings.strength}`);
  if (settings.negative_prompt) parts.push(`without “${settings.negative_prompt}”`);
  for (const [name, weight] of Object.entries(settings.loras ?? {})) {
    if (weight) parts.push(`${name} ${weight}`);
  }
  return parts.filter(Boolean).join(" · ");
}

/** Returns a name for a picture's file. */
export function fileName(settings, format) {
  const words = settings.prompt.trim().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${words || "picture"}-${settings.seed}.${format === "jpeg" ? "jpg" : format}`;
}
