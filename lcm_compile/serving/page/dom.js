// Small helpers to make elements.

/** Returns a new element. Properties that it has are set, others become attributes; `on…` are listeners. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

let count = 0;

/** Returns a control under its label: {row, control}. */
export function labelled(label, control) {
  control.id ||= `control-${++count}`;
  const row = make("div", { className: "field" }, make("label", { htmlFor: control.id }, label), control);
  return { row, control };
}

/** Returns a slider under its label, with its value beside it: {row, control, set}. */
export function slider(label, { min, max, step, value }, changed) {
  const output = make("span", { className: "value", ariaHidden: "true" }); // screen readers tell a slider's value
  const control = make("input", { type: "range", min, max, step, oninput: () => { show(); changed(); } });
  const { row } = labelled(label, control);
  const digits = (String(step).split(".")[1] ?? "").length;
  const show = () => { output.textContent = Number(control.valueAsNumber.toFixed(3)).toFixed(digits); };
  const set = (number) => {
    if (number < Number(control.min)) control.min = number;
    if (number > Number(control.max)) control.max = number;
    control.step = Number(number.toFixed(digits)) === number ? step : "any"; // else it would be rounded
    control.value = number;
    show();
  };
  row.classList.add("slider");
  row.insertBefore(output, control);
  set(value);
  return { row, control, set };
}

/** Fills a select with names, and keeps what is chosen if it is still there. "" is none. */
export function options(select, names, chosen = select.value) {
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name || "none")));
  select.value = names.includes(chosen) ? chosen : names[0] ?? "";
}

/** Saves a blob as a file. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

let told = 0;

/** Has a screen reader say a text once nothing else came for a second: pictures come too often for more. */
export function announce(text) {
  clearTimeout(told);
  told = setTimeout(() => { document.getElementById("told").textContent = text; }, 1000);
}

/** Returns a new copy of a template's one element. */
export function fill(template) {
  return document.getElementById(template).content.firstElementChild.cloneNode(true);
}
