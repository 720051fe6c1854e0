"""The laws of a random world: every path, cached and not, alone and in a batch, gives what the masked forward gives."""

import copy
from contextlib import suppress
from dataclasses import replace

import torch

from dynamic_llava.model.switches import choose_method
from tests.builders import FIRST_WORD, IMAGE_TOKEN, VOCABULARY, assert_same_logits
from tests.worlds import (
    HALF_TOLERANCE,
    TIE,
    Margins,
    Unjudged,
    build,
    chunks,
    has_tie,
    images_given,
    method_of,
    row_of,
    whole,
)

PER_TOKEN = ("input_ids", "attention_mask", "output_mask")


class Laws:
    """The laws of one world, each a method that asserts; Unjudged where rounding could change a decision of it."""

    def __init__(self, world):
        self.world, self.parts = world, chunks(world)
        self.model, self.twin = build(world.shape)
        self.batch = whole(self.parts)
        self.rows = len(world.rows)
        self.switches = {"sample_key": torch.arange(self.rows) + world.shape.seed}
        if world.method is None:
            self.switches["sparsity"] = world.mode
        else:
            self.switches["method"] = method_of(world)
        with Margins(self.model) as margins:
            out = self.model(**self.batch, labels=self.batch["input_ids"], **self.switches)
        self.refuse_ties(margins)
        self.expected, self.record = out.logits, out.sparsity
        self.keep, self.held = self.record.keep_mask.bool(), self.record.seen_by(self.record.layers - 1)
        self.real = self.batch["attention_mask"].bool()

    def refuse_ties(self, margins):
        """Leave a world unjudged in which rounding alone could change a decision."""
        looked_at = getattr(self.switches.get("method"), "images", margins.images)
        if has_tie(looked_at, margins.texts, self.world.shape):
            raise Unjudged("a tie")

    def of_rows(self, rows):
        """Return the switches of some rows."""
        return {name: value[rows] if name == "sample_key" else value for name, value in self.switches.items()}

    def ends(self, row):
        """Return the turns in which a row speaks, and where in the whole batch each of them ends."""
        found, start = {}, 0
        for turn, part in enumerate(self.parts):
            spoken = part["attention_mask"][row].nonzero()
            if len(spoken):
                found[turn] = start + int(spoken[-1])
            start += part["input_ids"].shape[1]
        return found

    def dropping_equals_masking(self):
        out = self.model(**self.batch, **self.switches)
        assert torch.equal(out.sparsity.keep_mask.bool(), self.keep)
        newest = self.real & (self.real.cumsum(1) == self.real.sum(1, keepdim=True))
        computed = self.keep & self.real | newest
        assert_same_logits(out.logits[computed], self.expected[computed])

    def scoring_equals_masking(self):
        switches = {name: value for name, value in self.switches.items() if name != "sample_key"}
        method = choose_method(self.model.config.sparsity, **switches)
        key = self.switches["sample_key"]
        out = self.model.model(**self.batch, method=method, sample_key=key, answers_only=True)
        where = self.batch["output_mask"] & self.real
        logits = self.model.lm_head(out.last_hidden_state)
        assert_same_logits(logits[where], self.expected[where], what="answers only")

    def turns(self, parts, switches, cache=None, first=0, **more):
        """Yield turn, what the model says in it on a live cache, and the cache."""
        for turn in range(first, len(parts)):
            seen = whole(parts[: turn + 1])
            width = parts[turn]["input_ids"].shape[1]
            out = self.model(
                input_ids=parts[turn]["input_ids"],
                **images_given([image for its in parts[turn]["images"] for image in its]),
                attention_mask=seen["attention_mask"],
                output_mask=seen["output_mask"],
                position_ids=seen["position_ids"][:, -width:],
                past_key_values=cache,
                use_cache=True,
                **{name: mask[:, : seen["input_ids"].shape[1]] for name, mask in more.items()},
                **switches,
            )
            cache = out.past_key_values
            yield turn, out, cache

    def assert_turn(self, turn, logits, expected, what, tolerance=1e-4):
        """Assert that the last token of each row in a turn says (B, N_turn, V) what it says in the whole batch."""
        start = sum(part["input_ids"].shape[1] for part in self.parts[:turn])
        for row in range(self.rows):
            end = self.ends(row).get(turn)
            if end is not None:
                assert_same_logits(
                    logits[row, end - start].float(), expected[row, end].float(), tolerance, f"{what}: turn {turn}"
                )

    def a_live_cache_equals_masking(self):
        for turn, out, _ in self.turns(self.parts, self.switches):
            self.assert_turn(turn, out.logits, self.expected, "live cache")
        assert out.sparsity.cache_lengths.tolist() == self.held.sum(1).tolist()
        assert out.sparsity.dense_cache_lengths.tolist() == self.record.seen_by(0).sum(1).tolist()

    def a_row_alone_equals_the_row_in_the_batch(self):
        for row in range(self.rows):
            ends, parts = self.ends(row), row_of(self.parts, row)
            turns = self.turns(parts, self.of_rows(slice(row, row + 1)))
            for (_, out, _), end in zip(turns, ends.values(), strict=True):
                assert_same_logits(out.logits[0, -1], self.expected[row, end], what=f"row {row} alone, column {end}")
            assert int(out.sparsity.cache_lengths) == int(self.held[row].sum())

    def permuted_rows_give_permuted_results(self):
        if self.rows < 2:
            raise Unjudged("one row")
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.world.shape.seed))
        batch = {name: self.batch[name][order] for name in (*PER_TOKEN, "position_ids")}
        batch |= images_given([one for row in order.tolist() for part in self.parts for one in part["images"][row]])
        out = self.model(**batch, labels=batch["input_ids"], **self.of_rows(order))
        real = self.real[order]
        assert_same_logits(out.logits[real], self.expected[order][real], what="permuted rows")

    def theirs(self):
        """Return the logits of transformers' own class, to which features of any length are given as embeddings."""
        plain = {name: value for name, value in self.batch.items() if name != "output_mask"}
        features = plain.pop("image_features", None)
        if features is not None:
            ids = plain.pop("input_ids")
            words = self.twin.get_input_embeddings()(ids)
            image = (ids == IMAGE_TOKEN)[..., None]
            plain["inputs_embeds"] = words.masked_scatter(image, torch.cat(features).to(words.dtype))
        return self.twin(**plain).logits

    def keeping_all_equals_transformers(self):
        plain = {name: value for name, value in self.batch.items() if name != "output_mask"}
        theirs = self.theirs()
        ours = self.model(**plain, sparsity="none").logits
        assert torch.equal(ours[self.real], theirs[self.real]), "none is not transformers'"
        everything = torch.ones_like(self.real)
        ours = self.model(**self.batch, keep_mask=everything).logits
        assert_same_logits(ours[self.real], theirs[self.real], what="everything kept")

    def a_cloned_cache_continued_twice_equals_two_runs(self):
        """Once with the world's own turns, once with other words: neither notices the other."""
        if len(self.parts) < 2:
            raise Unjudged("one turn")
        first, later = self.parts[:1], self.parts[1:]
        shift = (VOCABULARY - FIRST_WORD) // 2
        for part in later:
            ids = part["input_ids"]
            moved = (ids - FIRST_WORD + shift) % (VOCABULARY - FIRST_WORD) + FIRST_WORD
            part["other_ids"] = torch.where(ids >= FIRST_WORD, moved, ids)
        other = [*first, *({**part, "input_ids": part["other_ids"]} for part in later)]
        _, _, cache = next(self.turns(first, self.switches))
        clone = copy.deepcopy(cache)
        for parts, found in ((other, cache), (self.parts, clone)):
            alone = list(self.turns(parts, self.switches))[1:]
            for (turn, one, _), (_, run, _) in zip(
                self.turns(parts, self.switches, found, first=1), alone, strict=True
            ):
                assert torch.equal(one.logits, run.logits), f"turn {turn} of a continued cache differs from a run's"

    def under_autocast_every_path_agrees(self):
        """With full precision's decisions given; Unjudged where transformers' own class loses half as much by rounding.

        Half: two paths, each that far from full precision, are twice that far from each other.
        """
        dtype, given = getattr(torch, self.world.autocast), {"keep_mask": self.keep}
        tolerance = HALF_TOLERANCE[self.world.autocast]
        exact = self.theirs()[self.real]
        with torch.autocast("cpu", dtype):
            rounded = self.theirs()[self.real].float()
            if (rounded - exact).abs().max() > tolerance / 2 * exact.abs().max():
                raise Unjudged("badly conditioned")
            expected = self.model(**self.batch, **given, labels=self.batch["input_ids"]).logits
            computed = self.keep & self.real
            dropped = self.model(**self.batch, **given).logits
            assert_same_logits(dropped[computed].float(), expected[computed].float(), tolerance, "dropped")
            for turn, out, _ in self.turns(self.parts, {}, keep_mask=self.keep):
                self.assert_turn(turn, out.logits, expected, "live cache", tolerance)

    def prompt(self):
        """Return the first turn as `generate` takes it, padded on the left."""
        (part,) = chunks(replace(self.world, side="left", rows=tuple(row[:1] for row in self.world.rows)))
        return {name: part[name] for name in PER_TOKEN} | images_given([one for its in part["images"] for one in its])

    def generated(self, **call):
        """Return what `generate` says to the first turn; Unjudged where a decision of it hangs on rounding."""
        call = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | call
        with Margins(self.model) as margins, torch.random.fork_rng():
            torch.manual_seed(self.world.shape.seed)
            out = self.model.generate(**self.prompt(), **self.switches, **call)
        self.refuse_ties(margins)
        return out

    def greedy(self):
        """Return the greedy answers to the first turn; Unjudged where two tokens are equally good."""
        out = self.generated()
        best = torch.stack(out.logits, 1).topk(2, dim=-1).values
        if bool((best[..., 0] - best[..., 1] <= TIE).any()):
            raise Unjudged("two best tokens")
        return out

    def generating_with_and_without_cache(self):
        cached = self.greedy()
        uncached = self.generated(use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_logits(torch.stack(uncached.logits), torch.stack(cached.logits), what="generated without cache")
        assert torch.equal(cached.sparsity.keep_mask, uncached.sparsity.keep_mask)

    def compiled_steps_answer_as_eager_ones(self):
        eager = self.greedy()
        compiled = self.generated(compile=True)
        assert torch.equal(compiled.sequences, eager.sequences)
        assert_same_logits(torch.stack(compiled.logits), torch.stack(eager.logits), what="compiled")
        assert torch.equal(compiled.sparsity.keep_mask, eager.sparsity.keep_mask)

    def taught(self, out, copies):
        """Return the masked pass over generated sequences, `copies` of each row."""
        prompt, sequences = self.prompt(), out.sequences
        new = sequences.shape[1] - prompt["input_ids"].shape[1]
        images = [one for part in self.parts[:1] for found in part["images"] for _ in range(copies) for one in found]
        mask = torch.nn.functional.pad(prompt["attention_mask"].repeat_interleave(copies, 0), (0, new), value=1)
        output = torch.nn.functional.pad(prompt["output_mask"].repeat_interleave(copies, 0), (0, new), value=True)
        key = self.switches["sample_key"].repeat_interleave(copies, 0)
        with Margins(self.model) as margins:
            taught = self.model(
                input_ids=sequences, labels=sequences, attention_mask=mask, output_mask=output,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0), **images_given(images),
                **{**self.switches, "sample_key": key},
            )  # fmt: skip
        self.refuse_ties(margins)
        # Nothing is decided about the last token: it is never fed back.
        fed, ours = mask.bool()[:, :-1], out.sparsity.keep_mask.bool()[:, : sequences.shape[1] - 1]
        assert torch.equal(ours[fed], taught.sparsity.keep_mask.bool()[:, :-1][fed]), "decided otherwise"
        return taught.logits[:, -new - 1 : -1]

    def sampled_answers_are_what_the_masked_pass_says(self):
        copies = self.world.returned
        out = self.generated(do_sample=True, temperature=self.world.temperature, num_return_sequences=copies)
        assert_same_logits(torch.stack(out.logits, 1), self.taught(out, copies), what="sampled")

    def beams_are_what_the_masked_pass_says(self):
        call = {"num_beams": self.world.beams, "num_return_sequences": self.world.returned, "output_scores": True}
        out = self.generated(**call)
        logits = self.taught(out, self.world.returned).log_softmax(-1)
        chosen = out.sequences[:, -logits.shape[1] :]
        scores = logits.gather(-1, chosen[..., None])[..., 0].mean(1)
        assert_same_logits(out.sequences_scores, scores, what="scores of beams")

    def check(self):
        """Run every quick law on this world; return the names of those that judged it."""
        judged = []
        for law in QUICK_LAWS:
            with suppress(Unjudged):
                getattr(self, law)()
                judged.append(law)
        return judged


QUICK_LAWS = [
    "dropping_equals_masking",
    "scoring_equals_masking",
    "a_live_cache_equals_masking",
    "a_row_alone_equals_the_row_in_the_batch",
    "permuted_rows_give_permuted_results",
    "keeping_all_equals_transformers",
    "a_cloned_cache_continued_twice_equals_two_runs",
    "under_autocast_every_path_agrees",
    "generating_with_and_without_cache",
    "sampled_answers_are_what_the_masked_pass_says",
    "beams_are_what_the_masked_pass_says",
]
DEAR_LAWS = ["compiled_steps_answer_as_eager_ones"]
"""Each takes seconds: a small share of the worlds of the soak, none of the tests'."""
