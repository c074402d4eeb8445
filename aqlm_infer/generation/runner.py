"""Captured decode steps under a transformers model's ``generate`` and ``forward``.

``generate`` asks the model for a cache, runs the prompt, then calls ``forward`` with one token a
sequence. A ``StepRunner`` stands in the model's place for these calls: it hands out a static cache
that it keeps, runs a prompt on it with the operators of a step where the model's blocks are known,
and answers a step on such a cache by replaying a CUDA graph. Whatever it does not know (other
caches, padded prompts, hidden states) the model itself runs.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, StaticCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import StepCache
from .compiled import ForwardStep
from .errors import GenerationSetupError
from .llama import LlamaStep, why_not_llama
from .loop import decoding_loop
from .step import Body, DecodeStep

_ROUND = 256
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_PLAIN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache",
          "return_dict", "logits_to_keep"}  # fmt: skip
"""Arguments of ``forward`` that a captured step answers."""

_NOT_OURS = ("custom_generate", "assistant_model", "assistant_tokenizer", "tokenizer",
             "synced_gpus", "trust_remote_code")  # fmt: skip
"""Arguments of ``generate`` with which transformers' own loop runs."""

_LOOK_UP = "prompt_lookup_num_tokens"


@dataclass
class _Slot:
    """A cache, its step, and the handle on the cache that ``generate`` was last given."""

    cache: StepCache
    step: DecodeStep
    handle: weakref.ref

    def free(self) -> bool:
        return self.handle() is None


class StepRunner:
    """Caches and captured steps of one model, at most ``max_graphs`` of them.

    Slots are kept by (batch, rounded cache length); the least recently used goes first. A slot
    whose cache somebody still holds (``return_dict_in_generate``) is not given out again. Without
    ``capture`` steps are run, not replayed.
    """

    def __init__(
        self, model: nn.Module, max_length: int | None, max_graphs: int, compile: bool,
        capture: bool = True,
    ):  # fmt: skip
        self.model, self.max_length, self.max_graphs = model, max_length, max_graphs
        self.compile, self.capture = compile, capture
        self.counts: Counter = Counter()
        self._slots: list[_Slot] = []
        self._weights: list[int] = []
        self._pool = None
        self._under: dict[str, object] = {}
        kind = type(model)
        self._simple_inputs = (
            kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        )

    # -- installing --------------------------------------------------------------------------------

    _HOOKS = (
        "generate", "prepare_inputs_for_generation", "_prepare_cache_for_generation",
        "_valid_auto_compile_criteria",
    )  # fmt: skip
    _ALL = (*_HOOKS, "forward")

    def install(self) -> None:
        """Put the runner's methods in front of the model's own."""
        for name in self._HOOKS:
            if not hasattr(self.model, name):
                raise GenerationSetupError(
                    f"{type(self.model).__name__} has no {name}: this version of transformers is"
                    " not supported"
                )
        # What others have put in front of them (accelerate's hooks, code of the hub) stays under.
        self._under = {n: vars(self.model)[n] for n in self._ALL if n in vars(self.model)}
        for name in self._HOOKS:
            setattr(self.model, name, getattr(self, name))
        self.model.forward = _Forward(self)

    def uninstall(self) -> None:
        """Take them away, and drop all graphs and caches."""
        for name in self._ALL:
            delattr(self.model, name)
        vars(self.model).update(self._under)
        self._slots.clear()

    def _own(self, name: str):
        """The model's own method."""
        return self._under.get(name) or getattr(type(self.model), name).__get__(self.model)

    def __deepcopy__(self, memo):
        # For a deep copy of the model: its own runner, with no graphs yet.
        model = memo[id(self.model)]
        made = StepRunner(model, self.max_length, self.max_graphs, self.compile, self.capture)
        memo[id(self)] = made
        made._under = deepcopy(self._under, memo)
        return made

    # -- caches ------------------------------------------------------------------------------------

    def cache(self, batch: int, positions: int) -> StepCache:
        """An empty cache for at least ``positions`` positions of ``batch`` sequences.

        Raises GenerationSetupError when that is more than ``max_length``.
        """
        if self.max_length is not None and positions > self.max_length:
            raise GenerationSetupError(
                f"the prompt and the new tokens need {positions} cached positions, the cache has at"
                f" most {self.max_length} (max_length of prepare_for_generation)"
            )
        length = -(-max(positions, 1) // _ROUND) * _ROUND
        if self.max_length is not None:
            length = min(length, self.max_length)
        self._drop_stale()
        slot = next(
            (s for s in self._slots
             if s.free() and (s.step.batch, s.cache.length) == (batch, length)),
            None,
        )  # fmt: skip
        if slot is None:
            slot = self._new_slot(batch, length)
        else:
            self._slots.remove(slot)
            slot.cache.clear()
        self._slots.append(slot)
        handle = copy(slot.cache)  # shares the layers; dies when the caller lets go of it
        slot.handle = weakref.ref(handle)
        return handle

    def _new_slot(self, batch: int, length: int) -> _Slot:
        while len(self._slots) >= self.max_graphs:
            free = next((s for s in self._slots if s.free()), self._slots[0])
            self._slots.remove(free)
        if self._pool is None and self.capture:
            self._pool = torch.cuda.graph_pool_handle()
        cache = StepCache(self.model.config.get_text_config(), length, self.model.device)
        step = DecodeStep(
            cache, batch, lambda: self._body(cache, batch), self.counts, self._pool, self.capture
        )
        return _Slot(cache, step, lambda: None)

    def _body(self, cache: StepCache, batch: int) -> Body:
        if why_not_llama(self.model) is None:
            return LlamaStep(self.model, cache, batch, self.capture)
        return ForwardStep(self.model, self._own("forward"), cache, self.compile)

    def _drop_stale(self) -> None:
        """Drop the graphs when any tensor of the model is no longer where they read it."""
        weights = _addresses(self.model)
        if weights != self._weights:
            self._slots.clear()
            self._weights = weights

    def step_of(self, cache) -> DecodeStep | None:
        """The step of a cache that was given out for one ``generate``, None for others."""
        ours = isinstance(cache, StepCache) and not getattr(cache, "_is_user_defined", False)
        slot = self._slot_of(cache) if ours else None
        return None if slot is None else slot.step

    def _slot_of(self, cache: StepCache) -> _Slot | None:
        return next((s for s in self._slots if s.handle() is cache), None)

    def rehearsal(self):
        """Replays the step of the cache used last, at the position it has reached: for timing."""
        slot = self._slots[-1]
        state = slot.cache.lengths, slot.step.positions
        for tensor in state:
            tensor.sub_(1)  # the last position, not one past it
        before = [tensor.clone() for tensor in state]

        def replay() -> None:
            slot.step.run()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        return replay

    # -- in the model's place ----------------------------------------------------------------------

    def generate(self, *args, **kwargs):
        """The model's ``generate``, with a decoding loop of ours where it is greedy or samples."""
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        look_up = [kwargs, vars(config or self.model.generation_config)]
        named = any(kwargs.get(name) is not None for name in _NOT_OURS)
        if len(args) <= 2 and not named and not any(c.get(_LOOK_UP) for c in look_up):
            kwargs["custom_generate"] = decoding_loop(self.step_of, kwargs.get("streamer"))
        with self._on_device():
            return self._own("generate")(*args, **kwargs)

    def _on_device(self):
        # Triton's kernels, streams and events are those of the current device.
        device = self.model.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        ours = (
            generation_mode in _MODES
            and model_kwargs.get("past_key_values") is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "static", "dynamic")
            and not getattr(generation_config, "is_assistant", False)
        )
        if not ours:
            return self._own("_prepare_cache_for_generation")(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        positions = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        model_kwargs["past_key_values"] = self.cache(copies * batch_size, positions)
        return None

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # transformers compiles forward for any static cache; here the graph is ours.
        if isinstance(model_kwargs.get("past_key_values"), StepCache):
            return False
        return self._own("_valid_auto_compile_criteria")(model_kwargs, generation_config)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, attention_mask=None,
        inputs_embeds=None, is_first_iteration=False, **kwargs,
    ):  # fmt: skip
        step = next_sequence_length == 1 and isinstance(past_key_values, StepCache)
        if not (step and self._simple_inputs) or is_first_iteration:
            return self._own("prepare_inputs_for_generation")(
                input_ids, next_sequence_length=next_sequence_length,
                past_key_values=past_key_values, attention_mask=attention_mask,
                inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs,
            )  # fmt: skip
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., -1:]
        return {
            **kwargs,
            "input_ids": input_ids[:, -1:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }

    def _model_forward(self, *args, **kwargs):
        return self._own("forward")(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """The model's forward: a step on one of our caches is a replay, the rest is the model's."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, StepCache):
            if isinstance(cache, StaticCache):
                _check_room(cache.get_max_length(), 0, _tokens(args, kwargs))
            return self._model_forward(*args, **kwargs)
        tokens = _tokens(args, kwargs)
        filled, cache.filled = cache.known_filled(), None  # unknown, should what follows fail
        _check_room(cache.length, filled, tokens)
        slot = None if args else self._slot_of(cache)
        if slot is not None and self._is_step(slot, kwargs):
            run = self._step
        elif slot is not None and filled == 0 and self._is_prompt(slot, kwargs):
            run = self._prompt
        else:
            output = self._model_forward(*args, **kwargs)
            cache.filled = filled + tokens
            return output
        with self._on_device():
            logits = run(slot.step, kwargs["input_ids"], kwargs)
        cache.filled = filled + tokens
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @staticmethod
    def _step(step: DecodeStep, ids, kwargs) -> torch.Tensor:
        step.set_inputs(ids, kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return step.run()

    @staticmethod
    def _prompt(step: DecodeStep, ids, kwargs) -> torch.Tensor:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return step.prompt(ids, positions)

    def _is_step(self, slot: _Slot, kwargs) -> bool:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        return (
            ids is not None
            and ids.shape == slot.step.tokens.shape
            and slot.cache.layers[0].is_initialized
            and (mask is None or mask.dim() == 2 or mask.shape[1:3] == (1, 1))
            and _is_plain(kwargs)
        )

    def _is_prompt(self, slot: _Slot, kwargs) -> bool:
        """Whether a call on an empty cache is one that the body of the step can run."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        return (
            ids is not None
            and ids.shape[0] == slot.step.batch
            and ids.shape[1] > 0
            and kwargs.get("logits_to_keep") == 1
            and _is_plain(kwargs)
            and why_not_llama(self.model) is None
            and (mask is None or (mask.dim() == 2 and bool((mask != 0).all())))
        )


def _is_plain(kwargs) -> bool:
    """Whether a call of ``forward`` asks for logits alone, at positions of the usual kind."""
    positions = kwargs.get("position_ids")
    return (
        (positions is None or positions.dim() == 2)
        and kwargs.get("return_dict") is not False
        and not any(v for k, v in kwargs.items() if k not in _PLAIN)
        and not torch.is_grad_enabled()
    )


def _addresses(model: nn.Module) -> list[int]:
    """Where all tensors of the model are. ``generate`` waits for it: 0.5 ms for 32 blocks, where
    ``parameters()`` and ``buffers()`` take 1.0 (Zen 5)."""
    found, modules = [], [model]
    while modules:
        module = modules.pop()
        modules.extend(child for child in module._modules.values() if child is not None)
        for tensors in (module._parameters, module._buffers):
            found.extend(tensor.data_ptr() for tensor in tensors.values() if tensor is not None)
    return found


class _Forward:
    """The runner's forward, with the signature of the model's: ``generate`` reads it."""

    def __init__(self, runner: StepRunner):
        self.runner = runner
        self.__signature__ = inspect.signature(runner._own("forward"))

    def __call__(self, *args, **kwargs):
        return self.runner.forward(*args, **kwargs)


def _tokens(args, kwargs) -> int:
    """The number of new tokens of a call of ``forward``."""
    given = args[0] if args else kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    return 0 if given is None else given.shape[1]


def _check_room(length: int, filled: int, tokens: int) -> None:
    if filled + tokens > length:
        raise GenerationSetupError(
            f"{tokens} new tokens after {filled} do not fit the cache of {length} positions"
        )
