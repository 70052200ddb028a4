"""A pipeline's denoiser outside of its sampling loop: the same inputs, on states, timesteps and prompts that a loss chooses."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from torch import Tensor

from .diffusion import Schedule, generators, partial, prediction_of
from .families import Family, call_options
from .seams.denoiser import Branch, put_pooled
from .seams.prompt import encode_alone

PLAIN = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False}


class _Taken(Exception):
    """A call's inputs are known; the run that made them may end."""


class Denoising:
    """Predictions, states and images of a pipeline's model, for training.

    Works on a text-to-image pipeline of its own that shares all parts but the scheduler: DDIM on the model's noise schedule, or Euler
    on its flow, so that states are x_t = signal x0 + sigma noise for any sampler that the user prefers. Latents are as the family's
    loop has them (FLUX: packed). ``size``: pixels a side, None for the pipeline's own.
    """

    def __init__(self, pipe: Any, family: Family, size: int | None = None) -> None:
        self.family, self.size = family, size
        self.pipe = twin(pipe, family)
        self.schedule = Schedule.of(self.pipe.scheduler)
        self._known: dict[str, Branch] = {}
        ((_, self.denoiser),) = list(family.parts(pipe))[:1]
        self._inputs = self._first_call([""], [0])
        first = float(torch.as_tensor(self._inputs["timestep"]).flatten()[0]) / float(self.pipe.scheduler.timesteps[0])
        self._unit = 1.0 if first > 0.5 else 1 / self.pipe.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Branch:
        """Context [n, tokens, dim] and pooled vectors [n, dim] of prompts; each text is encoded once.

        The empty prompt is what the pipeline guides away from: zeros in SDXL, where its configuration says so.
        """
        for text in dict.fromkeys(prompts):
            if text not in self._known:
                embeds = encode_alone(self.pipe, self.family, [text])
                context, pooled = embeds["embeds"], embeds.get("pooled")
                assert context is not None
                if not text and self.pipe.config.get("force_zeros_for_empty_prompt"):
                    context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
                self._known[text] = context, pooled
        contexts, vectors = zip(*(self._known[text] for text in prompts), strict=True)
        return torch.cat(contexts), None if vectors[0] is None else torch.cat(vectors)

    def predict(self, x_t: Tensor, t: Tensor | float, prompts: Sequence[str] | Branch) -> Tensor:
        """What the model predicts [n, ...] at states x_t [n, ...] of timesteps t, [n] or one for all, for n prompts or their encodings."""
        n = len(x_t)
        context, pooled = prompts if isinstance(prompts, tuple) and isinstance(prompts[0], Tensor) else self.encode(prompts)  # type: ignore[arg-type]
        inputs = {key: value if key in self.family.unbatched else _rows(value, n) for key, value in self._inputs.items()}
        latents = inputs[self.family.inputs[0]]
        inputs[self.family.inputs[0]] = x_t.to(latents)
        inputs["timestep"] = (torch.as_tensor(t, dtype=torch.float32) * self._unit).expand(n).to(latents.device)
        inputs[self.family.context] = context
        put_pooled(inputs, self.family, slice(None), pooled)
        output = self.denoiser(**inputs)
        prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
        return prediction if prediction.dtype == torch.float64 else prediction.float()

    def states(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, stop: int, guidance: float) -> tuple[Tensor, Tensor]:
        """States x_t [n, ...] after ``stop`` of ``steps`` guided sampling steps, from 0 (pure noise) on, and their timestep."""
        if stop:
            return partial(self.pipe, list(prompts), steps=steps, stop=stop, seeds=seeds, **self._options(len(prompts), guidance))
        inputs = self._first_call(prompts, seeds, steps)
        return inputs[self.family.inputs[0]], self.pipe.scheduler.timesteps[0]

    @torch.no_grad()
    def paths(
        self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """States [n, steps + 1, ...] along guided runs, from pure noise to clean latents, and the timesteps [steps] of all but the last.

        ``stop``: end each run after that many steps, with states [n, stop + 1, ...].
        """
        states = [self._first_call(prompts, seeds, steps)[self.family.inputs[0]]]

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            states.append(values["latents"])
            if step + 1 == stop:
                pipe._interrupt = True
            return values

        self.pipe(
            list(prompts), num_inference_steps=steps, generator=generators(seeds), output_type="latent", callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"], **self._options(len(prompts), guidance),
        )  # fmt: skip
        return torch.stack(states, dim=1), torch.as_tensor(self.pipe.scheduler.timesteps).float()

    @torch.no_grad()
    def drawn(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float) -> tuple[Tensor, list[Image]]:
        """Clean latents [n, ...] of guided runs, and the images that they decode to."""
        last: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            last[:] = [values["latents"]]
            return values

        images: list[Image] = self.pipe(
            list(prompts), num_inference_steps=steps, generator=generators(seeds), callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"], **self._options(len(prompts), guidance),
        ).images  # fmt: skip
        return last[0], images

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """Random timesteps [n] of the training schedule: whole ones, or for flows any between."""
        top = self.pipe.scheduler.config.num_train_timesteps
        if self.schedule.prediction == "flow":
            return torch.rand(n, generator=generator) * top
        return torch.randint(top, (n,), generator=generator)

    def _options(self, n: int, guidance: float) -> dict[str, Any]:
        options: dict[str, Any] = {self.family.scale: guidance, **call_options(self.pipe)}
        if self.family.scale == "true_cfg_scale" and guidance > 1:
            options["negative_prompt"] = [""] * n
        if self.size is not None:
            options |= {"height": self.size, "width": self.size}
        return options

    @torch.no_grad()
    def _first_call(self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 2) -> dict[str, Any]:
        """The inputs of the denoiser's first call in an unguided run, by name."""
        found: dict[str, Any] = {}

        def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.update(dict(zip(self.family.inputs, args, strict=False)) | kwargs)
            raise _Taken

        with self.denoiser.register_forward_pre_hook(take, with_kwargs=True, prepend=True):
            try:
                self.pipe(list(prompts), num_inference_steps=steps, generator=generators(seeds), **self._options(len(prompts), 1.0))
            except _Taken:
                pass
        return found


def twin(pipe: Any, family: Family) -> Any:
    """A text-to-image pipeline of the family with the parts of ``pipe`` and a plain sampler; ``from_pipe`` would cast shared weights.

    It has no safety checker, since what is to be unlearned has to be seen.
    """
    cls = getattr(diffusers, family.pipelines[0])
    known = inspect.signature(cls.__init__).parameters
    given = {key: value for key, value in {**pipe.config, **pipe.components}.items() if key in known}
    given |= {key: value for key, value in {"safety_checker": None, "requires_safety_checker": False}.items() if key in known}
    made = cls(**given | {"scheduler": _sampler(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):
        made.default_sample_size = pipe.default_sample_size
    return made


def _sampler(scheduler: Any) -> Any:
    if prediction_of(scheduler) == "flow":
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return DDIMScheduler.from_config(scheduler.config, **PLAIN)


def _rows(value: Any, n: int) -> Any:
    """One row of every tensor in ``value``, n times."""
    if isinstance(value, Tensor):
        return value.expand(n, *value.shape[1:]) if value.ndim and len(value) == 1 else value
    if isinstance(value, dict):
        return {key: _rows(each, n) for key, each in value.items()}
    return value
