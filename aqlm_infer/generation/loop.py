"""The decoding loop of ``generate`` over captured steps, in which the device never waits.

transformers' loop reads after every step whether all sequences have ended, so the device idles
while the host prepares the next step. This loop queues the next step first and reads then. When
sequences end before ``max_length``, that step was one too many.

``generate`` takes the loop through its public argument ``custom_generate``; logits processors and
stopping criteria are those that ``generate`` prepared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .errors import GenerationSetupError
from .step import DecodeStep

StepOf = Callable[[object], DecodeStep | None]
"""The captured step of a cache, None for caches that are not the runner's."""


class Note:
    """What the host wants to know of a step, copied to it while the device goes on."""

    def __init__(self, batch: int, device: torch.device):
        pinned = device.type == "cuda"
        self.tokens = torch.empty(batch, dtype=torch.long, pin_memory=pinned)
        self.ended = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        self.sent = torch.cuda.Event() if pinned else None

    def send(self, tokens: torch.Tensor, ended: torch.Tensor | None) -> None:
        """Queue the copies of tokens [B] and of whether all sequences have ended (None: not)."""
        self.tokens.copy_(tokens, non_blocking=True)
        if ended is not None:
            self.ended.copy_(ended, non_blocking=True)
        if self.sent is not None:
            self.sent.record()

    def read(self) -> tuple[torch.Tensor, bool]:
        """Wait for what was sent last, and for nothing queued after it."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.tokens.clone(), bool(self.ended)


class Ends:
    """Which sequences have ended. Of ``generate``'s criteria, a length costs the device nothing."""

    def __init__(self, criteria, config, batch: int, device: torch.device):
        self.criteria, self.pad = criteria, config._pad_token_tensor
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.others = [c for c in criteria if type(c) is not MaxLengthCriteria]
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.tokens = None
        if len(self.others) == 1 and type(self.others[0]) is EosTokenCriteria:
            self.tokens = self.others[0].eos_token_id.to(device)

    def pad_ended(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens [B], with padding for sequences that have ended."""
        return torch.where(self.ended, self.pad, tokens) if self.pads else tokens

    def after(self, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """Whether all have ended, on the device; None where only their length can end them."""
        if not self.others:
            return None
        if self.tokens is not None:
            self.ended = self.ended | (tokens[:, None] == self.tokens).any(-1)
        else:
            self.ended = self.ended | self.criteria(ids, None)
        return self.ended.all()

    def full(self, ids: torch.Tensor) -> bool:
        """Whether the sequences have their greatest length."""
        return self.criteria.max_length is not None and ids.shape[1] >= self.criteria.max_length


def decoding_loop(step_of: StepOf, streamer) -> Callable:
    """A ``custom_generate`` function: greedy search and sampling over steps, the rest as ever."""

    def decode(
        model: nn.Module, input_ids, logits_processor, stopping_criteria, generation_config,
        **model_kwargs,
    ):  # fmt: skip
        mode = generation_config.get_generation_mode()
        method = GENERATION_MODES_MAPPING[mode]
        if "/" in method:
            raise GenerationSetupError(
                f"{mode.value} is code of the hub ({method}): a prepared model cannot run it"
            )
        step = step_of(model_kwargs.get("past_key_values"))
        positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        plain = input_ids.shape[1] > 0 and (positions is None or positions.dim() == 2)
        if (
            step is None
            or not plain
            or method != "_sample"
            or generation_config.return_dict_in_generate
        ):
            return getattr(type(model), method)(
                model, input_ids, logits_processor=logits_processor,
                stopping_criteria=stopping_criteria, generation_config=generation_config,
                streamer=streamer, synced_gpus=False, **model_kwargs,
            )  # fmt: skip
        if positions is None:
            positions = torch.full_like(input_ids, input_ids.shape[1] - 1)
        # The prompt runs in the model, and fills the cache.
        logits = model._prefill(input_ids, generation_config, model_kwargs).logits
        step.set_inputs(input_ids[:, -1:], positions[:, -1:] + 1, mask)
        return _loop(
            step, input_ids, logits, logits_processor, stopping_criteria, generation_config,
            streamer,
        )  # fmt: skip

    return decode


def _tell(note: Note, streamer) -> bool:
    """Give the streamer the tokens of a note; whether all sequences have ended."""
    sent, ended = note.read()
    if streamer is not None:
        streamer.put(sent)
    return ended


def _loop(step: DecodeStep, ids, logits, processors, criteria, config, streamer) -> torch.Tensor:
    greedy = not config.do_sample and not processors
    ends = Ends(criteria, config, ids.shape[0], ids.device)
    note, ended = Note(ids.shape[0], ids.device), False
    tokens = logits[:, -1].argmax(-1) if greedy else None
    following = False  # whether the step's inputs are the tokens chosen last
    while not ended:
        if not greedy:
            # A copy: processors may write it, and the step's own logits are overwritten.
            scores = processors(ids, logits[:, -1].to(torch.float32, copy=True))
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
        ids = torch.cat([ids, ends.pad_ended(tokens)[:, None]], -1)
        tokens = ids[:, -1]
        all_ended, full = ends.after(ids, tokens), ends.full(ids)
        watched = all_ended is not None or streamer is not None
        if watched:
            note.send(tokens, all_ended)
            if note.sent is None:  # a step on the CPU is no work to hide this behind
                ended = _tell(note, streamer)
        if not full and not ended:
            logits = step.run(None if following else tokens)
            # A sequence that has ended goes on with other tokens than its padding: nobody reads it.
            tokens, following = step.best, greedy
        if watched and note.sent is not None:
            ended = _tell(note, streamer)
        ended = ended or full
    if streamer is not None:
        streamer.end()
    return ids
