// What an annotator says of one item, as plain values: nothing here knows of a page, a browser or a server.
//
// A judgement has a place for each answer, in the order of the screen: 1 is the best, equal places tie, null is not
// placed yet. The strength of a pair is negative where the first answer is better, 0 for a tie, null before it is said.

export const PROMPT = -1;  // in `flagged`, among the numbers of answers

export const blank = (count) => ({
  places: Array(count).fill(null), strength: null, quality: "", ratings: {}, flagged: [],
  rationale: "", demonstration: "",
});
export const isPair = ({ places }) => places.length === 2;
export const isComplete = ({ places }) => places.every((place) => place !== null);
export const answersAt = ({ places }, place) => places.flatMap((its, answer) => (its === place ? [answer] : []));

// What is said. Each takes a judgement and returns the next one.

export const prefer = (judgement, strength) => ({
  ...judgement, strength, quality: "", places: strength === 0 ? [1, 1] : strength < 0 ? [1, 2] : [2, 1],
});

export function rank(judgement, answer, place) {
  // "All good" says nothing of which is better: a ranking after it begins anew.
  const places = judgement.quality ? Array(judgement.places.length).fill(null) : [...judgement.places];
  places[answer] = place;
  return { ...judgement, places, quality: "" };
}
// Where a ranking by keys goes on: at the first answer without a place, or the next one (which may be past the last).
export function following({ places }, answer) {
  const next = places.indexOf(null);
  return next >= 0 ? next : answer + 1;
}

// All good or all bad, which is a tie too; said again, it is taken back.
export function judgeAll(judgement, quality) {
  const off = judgement.quality === quality;
  return {
    ...judgement, quality: off ? "" : quality, places: Array(judgement.places.length).fill(off ? null : 1),
    strength: off || !isPair(judgement) ? null : 0,
  };
}

export const flag = (judgement, answer) => ({
  ...judgement, flagged: judgement.flagged.includes(answer)
    ? judgement.flagged.filter((other) => other !== answer) : [...judgement.flagged, answer],
});

// A mark of 0 takes the rating back.
export function rate(judgement, answer, attribute, mark) {
  const ratings = { ...judgement.ratings, [answer]: { ...judgement.ratings[answer] } };
  if (mark) ratings[answer][attribute] = mark; else delete ratings[answer][attribute];
  if (!Object.keys(ratings[answer]).length) delete ratings[answer];
  return { ...judgement, ratings };
}

export const write = (judgement, field, text) => ({ ...judgement, [field]: text });

// What the server has of it: answers in tiers, the best first.

export function fromDraft(draft, count, { attributes, scale }) {
  const judgement = blank(count);
  (draft.tiers ?? []).forEach((tier, i) => tier.forEach((answer) => { judgement.places[answer] = i + 1; }));
  for (const name of ["quality", "ratings", "flagged", "rationale", "demonstration"])
    if (draft[name]) judgement[name] = draft[name];
  if (isPair(judgement) && isComplete(judgement)) {
    const [a, b] = judgement.places;
    judgement.strength = a === b ? 0 : (draft.strength ?? 1) * (a < b ? -1 : 1);
  }
  return { ...judgement, ratings: stillAsked(judgement.ratings, attributes, scale) };
}
// What is asked no more can be neither seen nor sent.
function stillAsked(ratings, attributes, scale) {
  const asked = Object.entries(ratings).map(([answer, marks]) =>
    [answer, Object.entries(marks).filter(([name, mark]) => attributes.includes(name) && mark <= scale)]);
  return Object.fromEntries(asked.filter(([, marks]) => marks.length)
    .map(([answer, marks]) => [answer, Object.fromEntries(marks)]));
}

export function asVote(judgement, seconds) {
  const { places, strength, quality, ratings, flagged, rationale, demonstration } = judgement;
  const ranks = [...new Set(places)].filter((place) => place !== null).sort((a, b) => a - b);
  return {
    tiers: ranks.map((place) => answersAt(judgement, place)), strength: strength === null ? null : Math.abs(strength),
    quality, ratings, flagged, rationale: wellFormed(rationale), demonstration: wellFormed(demonstration), seconds,
  };
}
export function asSkip(judgement, reason, seconds) {
  const { rationale, demonstration, flagged } = asVote(judgement, seconds);
  return { skipped: reason, rationale, demonstration, flagged, seconds };
}
// Of a draft the places as they were given: a vote closes the gaps.
export const asDraft = (judgement) => ({
  ...asVote(judgement, null),
  tiers: Array.from({ length: Math.max(0, ...judgement.places) }, (_, i) => answersAt(judgement, i + 1)),
});

// Half a character, as a browser may cut one, is nothing that JSON can carry.
export const wellFormed = (text) =>
  text.trim().replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
export const secondsOf = (milliseconds) => Math.min(Math.round(milliseconds / 100) / 10, 1e6);
