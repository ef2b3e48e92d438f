// The page at work: what is shown now, and what each button and key does.
//
//   store.js  conversations in the browser      api.js   the server       chat.js  one answer
//   view.js   a turn's elements                 words.js what is said
//
// One conversation is shown, `state.current`. Answers go on coming into those that are not shown; `state.running` knows
// them. Elements of an answer are made once and stay with it (`views`), so that open thoughts stay open.

import { Refused, listModels, setKey } from "./api.js";
import { answerTurn } from "./chat.js";
import {
  loadConversations, newAnswer, newConversation, preference, remove, save, setPreference, title, whenChangedElsewhere,
} from "./store.js";
import { AnswerView, element, fit, iconButton, messageElement, submits } from "./view.js";
import { fillWords, say, setLanguage } from "./words.js";

const $ = (id) => document.getElementById(id);
const state = { models: [], conversations: [], current: null, running: new Map() };
let views = new WeakMap(); // answer -> AnswerView
const drawing = new Set(); // answers of which more has come since the last frame
const saving = new Map(); // conversation id -> timer

// Asking ---------------------------------------------------------------------------------------------------------

function send(text) {
  const conversation = state.current;
  if (!text.trim() || state.running.has(conversation.id) || !conversation.models.length) return false;
  if (!state.conversations.includes(conversation)) state.conversations.push(conversation);
  conversation.turns.push({ user: text, answers: conversation.models.map(newAnswer) });
  showAddress();
  answer(conversation, conversation.turns.length - 1, [...conversation.models.keys()]);
  return true;
}

/** What followed the message is gone: the conversation goes on from here. */
function resend(number, text) {
  stop();
  state.current.turns.length = number;
  state.running.delete(state.current.id);
  send(text);
}

/** The last turn's answers in these columns are asked for again. */
function again(columns) {
  const { turns, models } = state.current;
  if (!turns.length || state.running.has(state.current.id)) return;
  const { answers } = turns.at(-1);
  for (const column of columns) answers[column] = newAnswer(models[column] ?? answers[column].model);
  answer(state.current, turns.length - 1, columns);
}

async function answer(conversation, number, columns) {
  const controller = new AbortController();
  state.running.set(conversation.id, controller);
  conversation.updated = Date.now();
  keep(conversation);
  draw();
  toEnd();
  announce(say("answering"));
  const { answers } = conversation.turns[number];
  const keysNeeded = await Promise.all(columns.map((column) => answerTurn(conversation, number, column, {
    context: state.models.find(({ id }) => id === answers[column].model)?.context,
    signal: controller.signal,
    changed: () => changed(conversation, answers[column]),
  })));
  if (state.running.get(conversation.id) === controller) state.running.delete(conversation.id);
  drawAnswers();
  keep(conversation);
  draw();
  announce(columns.map((column) => say("answered", answers[column].tokens)).join(". "));
  if (keysNeeded.includes(true)) {
    await askKey();
    columns.forEach((column) => (answers[column] = newAnswer(answers[column].model)));
    answer(conversation, number, columns);
  }
}

/** More of an answer is there: it is shown with the next frame, and saved every second. */
function changed(conversation, answer) {
  if (!drawing.size) requestAnimationFrame(drawAnswers);
  drawing.add(answer);
  if (!saving.has(conversation.id)) saving.set(conversation.id, setTimeout(() => keep(conversation), 1000));
}

function drawAnswers() {
  const follow = atEnd();
  for (const answer of drawing) views.get(answer)?.update();
  drawing.clear();
  if (follow) toEnd();
}

function stop() {
  state.running.get(state.current.id)?.abort();
}

/** Save it, unless it has been deleted meanwhile. */
function keep(conversation) {
  clearTimeout(saving.get(conversation.id));
  saving.delete(conversation.id);
  if (state.conversations.includes(conversation) && !save(conversation)) notice(say("storageFull"));
}

// Conversations --------------------------------------------------------------------------------------------------

function open(conversation) {
  state.current = conversation;
  const known = conversation.models.filter((id) => state.models.some((model) => model.id === id));
  if (state.models.length) conversation.models = known.length ? known : firstModels();
  showAddress();
  document.body.classList.remove("drawer");
  draw();
  toEnd();
  focusMessage();
}

/** So that the page, loaded again, shows the same conversation. */
function showAddress() {
  const { turns, id } = state.current;
  history.replaceState(null, "", turns.length ? `#${id}` : location.pathname);
}

function begin() {
  open(newConversation(firstModels()));
}

/** Those last talked to, where they are served; else the first that chats. */
function firstModels() {
  const chats = state.models.filter(({ chat }) => chat !== false).map(({ id }) => id);
  const last = preference("models", []).filter((id) => chats.includes(id));
  return last.length ? last : chats.slice(0, 1);
}

function discard(conversation) {
  state.running.get(conversation.id)?.abort();
  state.conversations = state.conversations.filter((each) => each !== conversation);
  remove(conversation);
  if (conversation === state.current) begin();
  else draw();
  $("undo").hidden = false;
  $("undo").querySelector("button").onclick = () => {
    $("undo").hidden = true;
    state.conversations.push(conversation);
    keep(conversation);
    open(conversation);
  };
  $("undo").querySelector("button").focus();
  setTimeout(() => ($("undo").hidden = true), 8000);
}

function neighbour(step) {
  const shown = sorted();
  const place = shown.indexOf(state.current);
  const next = shown[place === -1 ? 0 : place + step];
  if (next) open(next);
}

const sorted = () => [...state.conversations].sort((a, b) => b.updated - a.updated);

/** Another tab wrote: take what it wrote, but for what is being answered here. */
function reload() {
  const busy = state.conversations.filter(({ id }) => state.running.has(id));
  const others = loadConversations().filter(({ id }) => !busy.some((each) => each.id === id));
  const shown = others.find(({ id }) => id === state.current.id);
  state.conversations = [...busy, ...others];
  if (shown && shown.updated !== state.current.updated) open(shown);
  else if (shown) state.conversations[state.conversations.indexOf(shown)] = state.current;
  drawConversations();
}

// Drawing --------------------------------------------------------------------------------------------------------

function draw() {
  const { turns, models } = state.current;
  const running = state.running.has(state.current.id);
  document.title = title(state.current) || "Seedling";
  document.body.classList.toggle("two", models.length > 1);
  $("empty").hidden = turns.length > 0;
  $("about").replaceChildren(...models.map(aboutModel));
  $("turns").replaceChildren(...turns.map(turnElement));
  $("send").hidden = running;
  $("stop").hidden = !running;
  drawConversations();
  drawModels();
}

function turnElement({ user, answers }, number) {
  const shown = answers.map((answer, column) => {
    if (!views.has(answer)) views.set(answer, new AnswerView(answer, { named: answers.length > 1, again: () => again([column]) }));
    return views.get(answer).element;
  });
  return element("section", { className: "turn" }, messageElement(user, (text) => resend(number, text)),
    element("div", { className: "answers" }, ...shown));
}

function drawConversations() {
  $("conversations").replaceChildren(...sorted().map((conversation) => {
    const name = title(conversation);
    const link = element("button", { className: "conversation", textContent: name, onclick: () => open(conversation) });
    if (conversation === state.current) link.ariaCurrent = "true";
    return element("li", {}, link, iconButton("delete", say("delete", name), () => discard(conversation)));
  }));
}

function drawModels() {
  const { models } = state.current;
  const labels = models.length > 1 ? ["modelA", "modelB"] : ["model"];
  $("models").replaceChildren(...models.map((id, column) => {
    const options = state.models.map((model) => element("option", {
      value: model.id, disabled: model.chat === false, selected: model.id === id,
      textContent: model.chat === false ? `${model.id} (${say("notChat")})` : model.id,
    }));
    const onchange = ({ target }) => choose(models.with(column, target.value));
    return element("select", { ariaLabel: say(labels[column]), title: say(labels[column]), onchange }, ...options);
  }));
  $("compare").hidden = state.models.filter(({ chat }) => chat !== false).length < 2;
  $("compare").ariaPressed = String(models.length > 1);
}

function choose(models) {
  state.current.models = models;
  setPreference("models", models);
  keep(state.current);
  draw();
}

function compare() {
  const [first] = state.current.models;
  const other = state.models.find(({ id, chat }) => id !== first && chat !== false);
  choose(state.current.models.length > 1 ? [first] : [first, other.id]);
}

function aboutModel(id) {
  const { parameters, context } = state.models.find((model) => model.id === id) ?? {};
  return element("span", {}, element("b", {}, id), parameters ? ` ${say("about", parameters, context)}` : "");
}

const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => $("log").scrollTo({ top: $("log").scrollHeight });
const announce = (text) => ($("status").textContent = text);

/** A line above the message box; with `retry` a button that calls it. */
function notice(text, retry) {
  $("notice").hidden = !text;
  $("notice").querySelector("span").textContent = text;
  const button = $("notice").querySelector("button");
  button.hidden = !retry;
  button.onclick = retry;
}

/** Where a keyboard would cover half the screen it is not called up unasked. */
function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) $("message").focus();
}

// Settings -------------------------------------------------------------------------------------------------------

const fields = () => $("settings-dialog").querySelectorAll("[name]");

function openSettings() {
  for (const field of fields()) {
    field.value = state.current.settings[field.name] ?? "";
    showValue(field);
  }
  $("settings-dialog").showModal();
}

function takeSetting({ target }) {
  showValue(target);
  if (!target.checkValidity()) return;
  const number = target.value === "" ? null : Number(target.value);
  state.current.settings[target.name] = target.name === "system" ? target.value : number;
  setPreference("settings", state.current.settings);
  keep(state.current);
}

function showValue(field) {
  const output = field.parentElement.querySelector("output");
  if (output) output.textContent = Number(field.value).toFixed(2);
}

/** Ask for the key until one is given; resolves when it has been. */
function askKey() {
  const dialog = $("key-dialog");
  $("key-problem").textContent = say(dialog.dataset.asked ? "keyWrong" : "keyNeeded");
  dialog.dataset.asked = "yes";
  $("key").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey($("key").value.trim());
      dialog.close();
      resolve();
    };
  });
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  setPreference("theme", theme);
  document.documentElement.dataset.theme = theme;
  const label = say({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[theme]);
  Object.assign($("theme-switch"), { ariaLabel: label, title: label });
}

function speak(language) {
  setPreference("language", language);
  setLanguage(language);
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  views = new WeakMap(); // made again in the new language
  fillWords(document);
  setTheme(preference("theme", "auto"));
  Object.assign($("language-switch"), { ariaLabel: say("language"), title: say("language") });
  $("keys-list").replaceChildren(...SHORTCUTS.flatMap(([keys, word]) => [
    element("dt", {}, ...keys.split(" ").map((key) => element("kbd", {}, key))), element("dd", {}, say(word)),
  ]));
  if (state.current) draw();
}

// Keys -----------------------------------------------------------------------------------------------------------

const SHORTCUTS = [
  ["Enter", "keySend"], ["Shift Enter", "keyLine"], ["Esc", "keyStop"], ["↑", "keyEdit"], ["Alt N", "keyNew"],
  ["Alt R", "keyAgain"], ["Alt ↑ ↓", "keyOther"], ["/", "keyMessage"], ["?", "keyHelp"],
];

/** Alt with a letter is known by the key's place: on some keyboards it writes another letter. */
const ALT = {
  KeyN: begin,
  KeyR: () => again([...(state.current.turns.at(-1)?.answers.keys() ?? [])]),
  ArrowUp: () => neighbour(-1),
  ArrowDown: () => neighbour(1),
};

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const writing = event.target.matches("textarea, input, select");
  const plain = { "/": () => $("message").focus(), "?": () => $("keys-dialog").showModal() };
  const action = event.key === "Escape" ? escape : event.altKey ? ALT[event.code] : !writing && plain[event.key];
  if (!action || event.isComposing || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  action();
}

function escape() {
  if (document.body.classList.contains("drawer")) closeDrawer();
  else stop();
}

function onMessageKey(event) {
  if (submits(event)) {
    event.preventDefault();
    sendMessage();
  } else if (event.key === "ArrowUp" && !event.altKey && $("message").value === "") {
    event.preventDefault();
    $("turns").querySelector(".turn:last-child .edit")?.click();
  }
}

function sendMessage() {
  if (!send($("message").value)) return;
  $("message").value = "";
  fit($("message"));
  focusMessage();
}

function closeDrawer() {
  document.body.classList.remove("drawer");
  $("menu-open").focus();
}

// Start ----------------------------------------------------------------------------------------------------------

function wire() {
  $("send").onclick = sendMessage;
  $("stop").onclick = () => (stop(), focusMessage());
  $("message").onkeydown = onMessageKey;
  $("message").oninput = () => fit($("message"));
  $("new").onclick = begin;
  $("compare").onclick = compare;
  $("menu-open").onclick = () => (document.body.classList.add("drawer"), $("new").focus());
  $("scrim").onclick = closeDrawer;
  $("settings-open").onclick = openSettings;
  fields().forEach((field) => (field.oninput = takeSetting));
  $("keys-open").onclick = () => $("keys-dialog").showModal();
  $("theme-switch").onclick = () => setTheme(THEMES[(THEMES.indexOf(preference("theme", "auto")) + 1) % THEMES.length]);
  $("language-switch").onclick = () => speak(document.documentElement.lang === "en" ? "zh" : "en");
  $("to-end").onclick = toEnd;
  $("log").onscroll = () => ($("to-end").hidden = atEnd());
  document.querySelectorAll("[data-close]").forEach((button) => (button.onclick = () => button.closest("dialog").close()));
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => state.conversations.filter(({ id }) => state.running.has(id)).forEach(keep));
  whenChangedElsewhere(reload);
}

async function connect() {
  try {
    state.models = await listModels();
    notice(state.models.length ? "" : say("noModels"));
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askKey().then(connect);
    notice(error instanceof Refused ? say("refused", error.message) : say("serverLost"), connect);
  }
  open(state.current);
}

speak(preference("language", navigator.language.startsWith("zh") ? "zh" : "en"));
wire();
state.conversations = loadConversations();
const asked = state.conversations.find(({ id }) => `#${id}` === location.hash);
state.current = asked ?? newConversation([]);
connect();
