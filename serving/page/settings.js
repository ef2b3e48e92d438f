// What a user sets: how answers are drawn (of one conversation, and of those begun after it), the key, the colours.
//
//   wireSettings(() => conversation, save)    its dialog changes conversation.settings, and calls `save`
//   await askKey()                            a key has been typed, and is sent with each request from now on
//   nextTheme()                               auto -> light -> dark -> auto

import { setKey } from "./api.js";
import { preference, setPreference } from "./store.js";
import { say } from "./words.js";

const $ = (id) => document.getElementById(id);

export function wireSettings(current, save) {
  const dialog = $("settings-dialog");
  const fields = dialog.querySelectorAll("[name]");
  $("settings-open").onclick = () => {
    for (const field of fields) {
      field[field.type === "checkbox" ? "checked" : "value"] = current().settings[field.name] ?? "";
      showValue(field);
    }
    dialog.showModal();
  };
  for (const field of fields) {
    field.oninput = () => {
      showValue(field);
      if (!field.checkValidity()) return; // it is marked, and what was set before holds
      current().settings[field.name] = valueOf(field);
      setPreference("settings", current().settings);
      save();
    };
  }
}

function valueOf({ type, checked, value }) {
  if (type === "checkbox") return checked;
  if (type === "textarea") return value;
  return value === "" ? null : Number(value);
}

function showValue(field) {
  const output = field.parentElement.querySelector("output");
  if (output) output.textContent = Number(field.value).toFixed(2);
}

/** Ask until a key is given; resolves when it has been. */
export function askKey() {
  const dialog = $("key-dialog");
  $("key-problem").textContent = say(dialog.dataset.asked ? "keyWrong" : "keyNeeded");
  dialog.dataset.asked = "yes";
  dialog.oncancel = (event) => event.preventDefault();
  $("key").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey($("key").value.trim());
      dialog.close();
      resolve();
    };
  });
}

const THEMES = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };

export function showTheme() {
  const theme = preference("theme", "auto");
  document.documentElement.dataset.theme = theme;
  const label = say(THEMES[theme]);
  Object.assign($("theme-switch"), { ariaLabel: label, title: label });
}

export function nextTheme() {
  const names = Object.keys(THEMES);
  setPreference("theme", names[(names.indexOf(preference("theme", "auto")) + 1) % names.length]);
  showTheme();
}
