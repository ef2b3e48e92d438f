// What a conversation looks like: from a turn (store.js) to elements. Text goes in as text; the one place where HTML is
// made of a string is `insertRendered`, and that string is the server's rendering of Markdown.
//
//   const view = new AnswerView(answer, {named: false, again});   view.element;   view.update()  after each chunk

import { renderMarkdown } from "./api.js";
import { say } from "./words.js";

const BLOCKS = "p, ul, ol, li, blockquote, figure, pre, pre > code, .table, table, tbody, tr, td, h1, h2, h3, h4, h5, h6";
const PAUSE = 300; // milliseconds between two renderings of an answer that is still coming

/** element("p", {className: "note"}, "text", child) */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  use.setAttribute("href", `#icon-${name}`);
  return svg;
}

export function iconButton(name, label, onclick, className = "") {
  return element("button", { className: `icon ${className}`, ariaLabel: label, title: label, onclick }, icon(name));
}

/** Browsers give a page the clipboard on localhost and under https alone; elsewhere there is no button. */
function copyButton(label, text) {
  if (!navigator.clipboard) return "";
  const button = iconButton("copy", label, async () => {
    await navigator.clipboard.writeText(text());
    button.replaceChildren(icon("done"));
    button.ariaLabel = say("copied");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.ariaLabel = label;
    }, 1500);
  });
  return button;
}

// Markdown -------------------------------------------------------------------------------------------------------

const rendered = new Map(); // Markdown -> HTML, so that nothing is asked twice
const policy = globalThis.trustedTypes?.createPolicy("rendered", { createHTML: (html) => html });

function insertRendered(target, html) {
  target.innerHTML = policy ? policy.createHTML(html) : html;
  for (const pre of target.querySelectorAll("pre")) {
    const language = pre.querySelector("code")?.className.replace("language-", "") ?? "";
    const code = pre.textContent;
    const caption = element("figcaption", {}, element("span", {}, language), copyButton(say("copyCode"), () => code));
    wrap(pre, element("figure", {}, caption));
    pre.tabIndex = 0; // wide code is scrolled by keys too
  }
  for (const table of target.querySelectorAll("table")) wrap(table, element("div", { className: "table", tabIndex: 0 }));
}

function wrap(inner, outer) {
  inner.replaceWith(outer);
  outer.append(inner);
}

/** Text that grows: what is rendered of it so far, and behind it, as plain text, what came since. */
class Markdown {
  element = element("div", { className: "markdown" });
  tail = element("span", { className: "tail" });
  text = "";
  shown = ""; // the part of the text that the HTML stands for
  working = false;

  show(text, complete) {
    Object.assign(this, { text, complete });
    if (!text.startsWith(this.shown)) {
      this.shown = "";
      this.element.replaceChildren();
    }
    if (rendered.has(text)) this.insert(text, rendered.get(text));
    else this.tail.textContent = text.slice(this.shown.length);
    if (!this.element.contains(this.tail)) this.element.append(this.tail);
    if (!this.working) this.work();
  }

  async work() {
    this.working = true;
    while (this.shown !== this.text) {
      const { text, complete } = this;
      const html = await renderMarkdown(text).catch(() => null);
      if (html === null) break; // the text stands as it came
      if (complete) rendered.set(text, html);
      if (this.text.startsWith(text)) this.insert(text, html);
      if (!complete) await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
    this.working = false;
  }

  insert(text, html) {
    if (this.shown === text) return;
    insertRendered(this.element, html);
    this.shown = text;
    this.tail.textContent = this.text.slice(text.length);
    let last = this.element; // the tail goes on where the rendered text ended: in its last paragraph, cell, or code
    while (last.lastElementChild?.matches(BLOCKS)) last = last.lastElementChild;
    if (last.tagName === "CODE" && last.lastChild?.data === "\n" && !text.endsWith("\n")) last.lastChild.remove();
    last.append(this.tail);
  }
}

// Answers --------------------------------------------------------------------------------------------------------

export class AnswerView {
  /** `named`: the model's name stands above it. `again` asks again. */
  constructor(answer, { named, again }) {
    this.answer = answer;
    this.note = element("p", { className: "note" });
    this.summary = element("summary");
    this.thoughts = element("div", { className: "thoughts" });
    this.thinking = element("details", {}, this.summary, this.thoughts);
    this.markdown = new Markdown();
    this.calls = element("div", { className: "calls" });
    this.problem = element("span");
    this.failure = element("p", { className: "problem" }, this.problem,
      element("button", { textContent: say("retry"), onclick: again }));
    this.failure.role = "alert";
    this.stats = element("span", { className: "stats" });
    const buttons = [copyButton(say("copy"), () => answer.content), iconButton("again", say("again"), again, "again")];
    this.footer = element("footer", {}, this.stats, ...buttons);
    this.element = element("article", { className: "answer", ariaLabel: say("answerOf", answer.model) },
      named ? element("h2", {}, answer.model) : "", this.note, this.thinking, this.markdown.element, this.calls,
      this.failure, this.footer);
    this.update();
  }

  update() {
    const { state, content, reasoning, calls, leftOut } = this.answer;
    const running = state === "running";
    this.element.classList.toggle("running", running);
    this.element.ariaBusy = String(running);
    show(this.note, leftOut ? say("leftOut", leftOut) : "");
    this.thinking.hidden = !reasoning;
    this.summary.textContent = running && !content ? say("thinking") : say("thought");
    this.thoughts.textContent = reasoning;
    this.markdown.show(content, !running);
    this.calls.replaceChildren(...calls.map(callElement));
    this.failure.hidden = !["lost", "refused"].includes(state);
    this.footer.hidden = !this.failure.hidden && !content;
    this.problem.textContent = this.failure.hidden ? "" : this.reason();
    this.stats.textContent = this.measures();
    this.stats.title = this.answer.model + (this.answer.first ? `, ${say("first", this.answer.first)}` : "");
  }

  reason() {
    const { state, content, reasoning, problem } = this.answer;
    if (state === "refused") return say("refused", problem);
    return say(content || reasoning ? "connectionLost" : "serverLost");
  }

  /** "12 tokens · 84 tokens/s"; a speed is that of the tokens after the first, which also waits for the prompt. */
  measures() {
    const { state, tokens, seconds } = this.answer;
    const rate = tokens > 1 && seconds > 0.02 ? say("speed", (tokens - 1) / seconds) : "";
    const end = { stopped: say("stopped"), cut: say("cut") }[state] ?? "";
    return [tokens ? say("tokens", tokens) : "", rate, end].filter(Boolean).join(" · ");
  }
}

function show(target, text) {
  target.textContent = text;
  target.hidden = !text;
}

function callElement({ function: { name, arguments: text } }) {
  return element("figure", { className: "call" },
    element("figcaption", {}, icon("tool"), say("toolCall", name)), element("pre", { tabIndex: 0 }, indented(text)));
}

/** JSON on several lines; what is not JSON, as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// Messages -------------------------------------------------------------------------------------------------------

/** A user's message with a button to edit it; `send(text)` takes the edited one. */
export function messageElement(text, send) {
  const message = element("article", { className: "user", ariaLabel: say("you") });
  const shown = [
    element("p", {}, text),
    iconButton("edit", say("edit"), () => message.replaceChildren(editor(text, send, leave)), "edit"),
  ];
  const leave = () => {
    message.replaceChildren(...shown);
    shown[1].focus();
  };
  message.replaceChildren(...shown);
  return message;
}

function editor(text, send, leave) {
  const box = element("textarea", { value: text, ariaLabel: say("edit") });
  const finish = () => (box.value.trim() ? send(box.value) : box.focus());
  box.onkeydown = (event) => {
    if (event.key === "Escape") leave();
    if (submits(event)) finish();
    if (event.key === "Escape" || submits(event)) event.preventDefault();
    event.stopPropagation();
  };
  box.oninput = () => fit(box);
  queueMicrotask(() => {
    fit(box);
    box.focus();
  });
  return element("div", { className: "editor" }, box,
    element("div", { className: "buttons" }, element("span", { className: "small" }, say("editHint")),
      element("button", { textContent: say("cancel"), onclick: leave }),
      element("button", { textContent: say("send"), className: "main", onclick: finish })));
}

/** Enter sends, but not while it ends a word of an input method, nor with Shift. */
export const submits = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** As high as its text. */
export function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}
