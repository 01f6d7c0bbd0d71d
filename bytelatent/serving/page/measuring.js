/** Where the browser has put the characters of a block. */

import { graphemes } from "./text.js";

const RTL = /\p{Script=Arabic}|\p{Script=Hebrew}|\p{Script=Syriac}|\p{Script=Thaana}|\p{Script=Nko}/u;

/**
 * The characters of a block in order, with bytes `from` to `to`: their `row`, their `left` and `right` edge, and in
 * the direction of the text where the first byte begins and the last one ends. Notes the block's size, too.
 *
 * `row`: height of a row; `shift`: by how much the text is lowered in it.
 */
export function measured(block, row, shift) {
  const begins = graphemes(block.shown);
  const range = document.createRange();
  const box = block.element.getBoundingClientRect();
  const glyphs = [];
  for (let i = 0; i + 1 < begins.length; i++) {
    const [start, end] = [begins[i], begins[i + 1]];
    range.setStart(block.node, start);
    range.setEnd(block.node, block.shown[end - 1] === "\n" ? end - 1 : end);
    const rects = range.getClientRects();
    const rect = rects[rects.length - 1] ?? box;
    const [left, right] = [rect.left - box.left, rect.right - box.left];
    const isSpace = block.shown[start] === " ";
    const before = glyphs[i - 1];
    const number = Math.floor((rect.top + rect.height / 2 - box.top - shift) / row);
    // Spaces follow the direction of what is before them.
    const isRtl = isSpace ? before && before.begin > before.end && before.row === number : RTL.test(block.shown.slice(start, end));
    glyphs.push({
      from: block.at[start],
      to: end < block.at.length ? block.at[end] : block.to,
      row: number,
      left,
      right,
      begin: isRtl ? right : left,
      end: isRtl ? left : right,
      isSpace,
    });
  }
  block.width = box.width;
  block.height = box.height;
  return glyphs;
}
