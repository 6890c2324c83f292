// Judgements as values: what each act makes of them, what is sent, and what a draft brings back.
import assert from "node:assert/strict";
import test from "node:test";
import {
  PROMPT, createJudgement, findNextAnswer, fromDraft, isComplete, judgeAll, prefer, rank, rate, replaceLoneSurrogates,
  setText, toDraft, toSeconds, toSkip, toVote, toggleFlag,
} from "../../annotate/web/static/judgement.js";

const ASKED = { attributes: ["helpful", "honest"], scale: 5 };
// Frozen, so that an act that changed what it was given would throw.
const frozen = (value) => {
  if (value && typeof value === "object") Object.values(Object.freeze(value)).forEach(frozen);
  return value;
};
const placed = (...places) => frozen({ ...createJudgement(places.length), places });
// As it goes over the wire.
const sent = (value) => JSON.parse(JSON.stringify(value));

// All places of so many answers where there are few of them, else a sample that is the same every time.
function* allPlaces(count) {
  const values = [null, ...Array.from({ length: count }, (_, i) => i + 1)], total = values.length ** count;
  const step = Math.max(1, Math.floor(total / 500) + 1) | 1;
  for (let n = 0; n < total; n += count <= 4 ? 1 : step)
    yield Array.from({ length: count }, (_, i) => values[Math.floor(n / values.length ** i) % values.length]);
}

test("a blank judgement says nothing, and is not complete", () => {
  for (let count = 2; count <= 9; count += 1) {
    const vote = toVote(frozen(createJudgement(count)), 1.5);
    assert.deepEqual(vote, { tiers: [], strength: null, quality: "", ratings: {}, flagged: [], rationale: "",
      demonstration: "", seconds: 1.5 });
    assert.equal(isComplete(createJudgement(count)), false);
  }
});

test("a preference places both answers, and is sent by its size", () => {
  const tiers = { "-3": [[0], [1]], "-2": [[0], [1]], "-1": [[0], [1]], 0: [[0, 1]], 1: [[1], [0]], 2: [[1], [0]],
    3: [[1], [0]] };
  for (let strength = -3; strength <= 3; strength += 1) {
    const judgement = prefer(frozen(createJudgement(2)), strength), vote = toVote(judgement, null);
    assert.ok(isComplete(judgement));
    assert.deepEqual([vote.tiers, vote.strength], [tiers[strength], Math.abs(strength)]);
    assert.deepEqual(fromDraft(sent(toDraft(judgement)), 2, ASKED), judgement);  // and comes back with its sign
    assert.deepEqual(fromDraft(sent(vote), 2, ASKED), judgement);  // from an undone vote too
  }
});

test("a vote orders exactly the answers that were placed, ties together, without gaps", () => {
  for (let count = 2; count <= 9; count += 1)
    for (const places of allPlaces(count)) {
      const judgement = placed(...places), { tiers } = toVote(judgement, null);
      const tierOf = (answer) => tiers.findIndex((tier) => tier.includes(answer));
      const answers = [...places.keys()].filter((answer) => places[answer] !== null);
      assert.deepEqual(tiers.flat().sort(), answers);
      assert.ok(tiers.every((tier) => tier.length));
      assert.equal(isComplete(judgement), answers.length === count);
      for (const a of answers)
        for (const b of answers)
          assert.equal(Math.sign(tierOf(a) - tierOf(b)), Math.sign(places[a] - places[b]), `${places}: ${a}, ${b}`);
    }
});

test("a draft keeps the places as they were given, gaps and all", () => {
  assert.deepEqual(toDraft(placed(3, 1, null)).tiers, [[1], [], [0]]);
  assert.deepEqual(toVote(placed(3, 1, null), null).tiers, [[1], [0]]);
  assert.deepEqual(toDraft(placed(null, null, null)).tiers, []);
  for (let count = 3; count <= 9; count += 1)
    for (const places of allPlaces(count))
      assert.deepEqual(fromDraft(sent(toDraft(placed(...places))), count, ASKED).places, places);
});

test("a draft brings back all that was said, and no time", () => {
  let judgement = rank(rank(createJudgement(3), 2, 1), 0, 3);
  judgement = rate(toggleFlag(toggleFlag(judgement, PROMPT), 1), 1, "helpful", 4);
  judgement = setText(setText(judgement, "rationale", "because"), "demonstration", "so");
  assert.equal(toDraft(judgement).seconds, null);
  assert.deepEqual(fromDraft(sent(toDraft(judgement)), 3, ASKED), judgement);
  const good = judgeAll(frozen(judgement), "good");
  assert.deepEqual(fromDraft(sent(toDraft(good)), 3, ASKED), good);
  assert.deepEqual(fromDraft({}, 3, ASKED), createJudgement(3));  // the server has none
});

test("a pair's draft has a strength only where both are placed, and 1 where it names none", () => {
  assert.equal(fromDraft({ tiers: [[1]], strength: 2 }, 2, ASKED).strength, null);
  assert.equal(fromDraft({ tiers: [[1], [0]] }, 2, ASKED).strength, 1);
  assert.equal(fromDraft({ tiers: [[0], [1]] }, 2, ASKED).strength, -1);
  assert.equal(fromDraft({ tiers: [[0, 1]], strength: 3 }, 2, ASKED).strength, 0);
  assert.equal(fromDraft({ tiers: [[0], [1], [2]], strength: 3 }, 3, ASKED).strength, null);
});

test("ratings that nobody asks for any more are dropped", () => {
  const ratings = { 0: { helpful: 5, kind: 2 }, 1: { kind: 1 }, 2: { honest: 3 } };
  const seen = (asked) => fromDraft({ ratings }, 3, asked).ratings;
  assert.deepEqual(seen(ASKED), { 0: { helpful: 5 }, 2: { honest: 3 } });
  assert.deepEqual(seen({ ...ASKED, scale: 3 }), { 2: { honest: 3 } });
  assert.deepEqual(seen({ attributes: [], scale: 5 }), {});
});

test("a ranking after all good begins anew, and otherwise keeps the others' places", () => {
  for (let count = 3; count <= 9; count += 1) {
    const judgement = rank(frozen(judgeAll(createJudgement(count), "good")), 1, 2);
    assert.deepEqual(judgement, placed(null, 2, ...Array(count - 2).fill(null)));
  }
  assert.deepEqual(rank(placed(1, 2, 3), 2, 1).places, [1, 2, 1]);
  assert.deepEqual(rank(placed(1, 2, 3), 0, null).places, [null, 2, 3]);  // a chip that is dragged back
});

test("all good is a tie, and said again it is taken back", () => {
  for (const quality of ["good", "bad"])
    for (let count = 2; count <= 9; count += 1) {
      const said = frozen(judgeAll(createJudgement(count), quality)), vote = toVote(said, null);
      assert.deepEqual([vote.quality, vote.tiers], [quality, [[...Array(count).keys()]]]);
      assert.equal(vote.strength, count === 2 ? 0 : null);
      assert.deepEqual(judgeAll(said, quality), createJudgement(count));
      const other = quality === "good" ? "bad" : "good";
      assert.deepEqual(judgeAll(said, other), judgeAll(createJudgement(count), other));
    }
  assert.equal(prefer(judgeAll(createJudgement(2), "bad"), -2).quality, "");
});

test("a ranking by keys goes on at the first answer without a place", () => {
  assert.equal(findNextAnswer(placed(null, 1, null), 1), 0);
  assert.equal(findNextAnswer(placed(1, null, null), 0), 1);
  assert.equal(findNextAnswer(placed(1, 2, 3), 1), 2);
  assert.equal(findNextAnswer(placed(1, 2, 3), 2), 3);  // the page takes it around
});

test("flags are set and taken back one by one, the prompt's too", () => {
  const both = toggleFlag(frozen(toggleFlag(frozen(createJudgement(2)), 1)), PROMPT);
  assert.deepEqual(both.flagged, [1, PROMPT]);
  assert.deepEqual(toggleFlag(frozen(both), 1).flagged, [PROMPT]);
  assert.deepEqual(toggleFlag(toggleFlag(both, PROMPT), PROMPT).flagged, [1, PROMPT]);
});

test("a rating is set, changed and taken back, and an answer without one leaves nothing", () => {
  const one = frozen(rate(frozen(createJudgement(2)), 0, "helpful", 3)), two = frozen(rate(one, 0, "honest", 1));
  assert.deepEqual(two.ratings, { 0: { helpful: 3, honest: 1 } });
  assert.deepEqual(rate(two, 0, "helpful", 5).ratings, { 0: { helpful: 5, honest: 1 } });
  assert.deepEqual(rate(two, 1, "helpful", 5).ratings, { 0: { helpful: 3, honest: 1 }, 1: { helpful: 5 } });
  assert.deepEqual(rate(two, 0, "helpful", 0).ratings, { 0: { honest: 1 } });
  assert.deepEqual(rate(one, 0, "helpful", 0).ratings, {});
  assert.deepEqual(rate(frozen(createJudgement(2)), 1, "honest", 0).ratings, {});
});

test("half a character is replaced, and whole ones are not", () => {
  for (const [text, expected] of [
    ["cut \ud83d ok \u{1f600}", "cut \ufffd ok \u{1f600}"], ["\ud83d", "\ufffd"], ["\ude00", "\ufffd"],
    ["\ude00\ud83d", "\ufffd\ufffd"], ["\ud83d\ud83d\ude00", "\ufffd\u{1f600}"], ["\u{1f600}\ude00", "\u{1f600}\ufffd"],
    ["  a\n ", "a"], ["", ""], ["é\u{10ffff}\ufffd", "é\u{10ffff}\ufffd"],
  ]) {
    assert.equal(replaceLoneSurrogates(text), expected);
    assert.ok(replaceLoneSurrogates(text).isWellFormed());
    const judgement = setText(setText(createJudgement(2), "rationale", text), "demonstration", text);
    for (const said of [toVote(judgement, 1), toSkip(judgement, "other", 1), toDraft(judgement)])
      assert.deepEqual([said.rationale, said.demonstration], [expected, expected]);
  }
});

test("a skip takes along what was written and flagged, and nothing of the ranking", () => {
  const judgement = setText(toggleFlag(prefer(createJudgement(2), 2), 0), "rationale", "why");
  assert.deepEqual(toSkip(frozen(judgement), "language", 2.5),
    { skipped: "language", rationale: "why", demonstration: "", flagged: [0], seconds: 2.5 });
});

test("seconds have one decimal, and an end", () => {
  assert.deepEqual([0, 49, 50, 1234, 9.99e12].map(toSeconds), [0, 0, 0.1, 1.2, 1e6]);
});

test("whatever is done in whatever order, the server can take what comes of it", () => {
  for (const count of [2, 3]) {
    const acts = [
      (j) => judgeAll(j, "good"), (j) => judgeAll(j, "bad"), (j) => toggleFlag(j, 0), (j) => toggleFlag(j, PROMPT),
      (j) => rate(j, 1, "helpful", 2), (j) => rate(j, 1, "helpful", 0),
      (j) => fromDraft(sent(toDraft(j)), count, ASKED),
      ...(count === 2 ? [-3, 0, 1].map((strength) => (j) => prefer(j, strength))
        : [0, 1, 2].flatMap((answer) => [null, 1, 3].map((place) => (j) => rank(j, answer, place)))),
    ];
    const check = (judgement, left) => {
      const { tiers, strength, quality, flagged, ratings } = toVote(judgement, 0);
      assert.equal(new Set(tiers.flat()).size, tiers.flat().length);
      assert.ok(!quality || (tiers.length === 1 && isComplete(judgement)));
      assert.equal(strength !== null, count === 2 && isComplete(judgement));
      if (strength !== null) assert.equal(strength === 0, tiers.length === 1);
      assert.equal(new Set(flagged).size, flagged.length);
      assert.ok(Object.values(ratings).every((marks) => Object.keys(marks).length));
      if (left) for (const act of acts) check(frozen(act(judgement)), left - 1);
    };
    check(frozen(createJudgement(count)), count === 2 ? 4 : 3);
  }
});
