// An annotator's judgement of one item, as plain values. This module uses neither page nor browser nor server.
//
// A judgement has a place for each answer, in the order of the screen: 1 is the best, equal places tie, null is not
// placed yet. The strength of a pair is negative if the first answer is better, 0 for a tie, null if not given yet.

export const PROMPT = -1;  // stands for the prompt in `flagged`, among the numbers of answers

export const createJudgement = (count) => ({
  places: Array(count).fill(null), strength: null, quality: "", ratings: {}, flagged: [],
  rationale: "", demonstration: "",
});
export const isPair = ({ places }) => places.length === 2;
export const isComplete = ({ places }) => places.every((place) => place !== null);
// Returns the numbers of the answers on a place; with null, those without a place.
export const findAnswersAt = ({ places }, place) =>
  places.flatMap((answerPlace, answer) => (answerPlace === place ? [answer] : []));

// Changes of a judgement. Each function returns a new one.

// Judges a pair by a strength from -3 (the first answer is much better) to 3 (the second is).
export const prefer = (judgement, strength) => ({
  ...judgement, strength, quality: "", places: strength === 0 ? [1, 1] : strength < 0 ? [1, 2] : [2, 1],
});

// Puts an answer on a place; null takes it off.
export function rank(judgement, answer, place) {
  // "All good" ranks nothing, so a ranking after it starts from scratch.
  const places = judgement.quality ? Array(judgement.places.length).fill(null) : [...judgement.places];
  places[answer] = place;
  return { ...judgement, places, quality: "" };
}
// Returns the answer that keys rank next: the first without a place, or the next one, which may be past the last.
export function findNextAnswer({ places }, answer) {
  const next = places.indexOf(null);
  return next >= 0 ? next : answer + 1;
}

// Judges all answers as good, or all as bad, which is also a tie. The same call again undoes it.
export function judgeAll(judgement, quality) {
  const isRepeated = judgement.quality === quality;
  return {
    ...judgement, quality: isRepeated ? "" : quality,
    places: Array(judgement.places.length).fill(isRepeated ? null : 1),
    strength: isRepeated || !isPair(judgement) ? null : 0,
  };
}

// Flags an answer or the prompt as harmful, or takes its flag back.
export const toggleFlag = (judgement, answer) => ({
  ...judgement, flagged: judgement.flagged.includes(answer)
    ? judgement.flagged.filter((other) => other !== answer) : [...judgement.flagged, answer],
});

// Rates an answer by an attribute. A mark of 0 removes the rating.
export function rate(judgement, answer, attribute, mark) {
  const ratings = { ...judgement.ratings, [answer]: { ...judgement.ratings[answer] } };
  if (mark) ratings[answer][attribute] = mark; else delete ratings[answer][attribute];
  if (!Object.keys(ratings[answer]).length) delete ratings[answer];
  return { ...judgement, ratings };
}

export const setText = (judgement, field, text) => ({ ...judgement, [field]: text });

// Conversion from and to the server's format: answers in tiers, the best first.

export function fromDraft(draft, count, { attributes, scale }) {
  const judgement = createJudgement(count);
  (draft.tiers ?? []).forEach((tier, i) => tier.forEach((answer) => { judgement.places[answer] = i + 1; }));
  for (const name of ["quality", "ratings", "flagged", "rationale", "demonstration"])
    if (draft[name]) judgement[name] = draft[name];
  if (isPair(judgement) && isComplete(judgement)) {
    const [a, b] = judgement.places;
    judgement.strength = a === b ? 0 : (draft.strength ?? 1) * (a < b ? -1 : 1);
  }
  return { ...judgement, ratings: removeUnknownRatings(judgement.ratings, attributes, scale) };
}
// Removes ratings of attributes that the project no longer has: they could be neither seen nor sent.
function removeUnknownRatings(ratings, attributes, scale) {
  const validRatings = Object.entries(ratings).map(([answer, marks]) =>
    [answer, Object.entries(marks).filter(([name, mark]) => attributes.includes(name) && mark <= scale)]);
  return Object.fromEntries(validRatings.filter(([, marks]) => marks.length)
    .map(([answer, marks]) => [answer, Object.fromEntries(marks)]));
}

// Converts a judgement to a vote. `seconds` is the time spent on the item; null if it was not measured.
export function toVote(judgement, seconds) {
  const { places, strength, quality, ratings, flagged, rationale, demonstration } = judgement;
  const ranks = [...new Set(places)].filter((place) => place !== null).sort((a, b) => a - b);
  return {
    tiers: ranks.map((place) => findAnswersAt(judgement, place)),
    strength: strength === null ? null : Math.abs(strength),
    quality, ratings, flagged,
    rationale: replaceLoneSurrogates(rationale), demonstration: replaceLoneSurrogates(demonstration), seconds,
  };
}
export function toSkip(judgement, reason, seconds) {
  const { rationale, demonstration, flagged } = toVote(judgement, seconds);
  return { skipped: reason, rationale, demonstration, flagged, seconds };
}
// A draft keeps empty places as empty tiers; a vote leaves them out.
export const toDraft = (judgement) => ({
  ...toVote(judgement, null),
  tiers: Array.from({ length: Math.max(0, ...judgement.places) }, (_, i) => findAnswersAt(judgement, i + 1)),
});

// Replaces lone surrogates, which browsers may leave when they cut a text and which JSON cannot hold.
export const replaceLoneSurrogates = (text) =>
  text.trim().replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
export const toSeconds = (milliseconds) => Math.min(Math.round(milliseconds / 100) / 10, 1e6);
