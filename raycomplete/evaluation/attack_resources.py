"""What attacks use besides the generator: white boxes, the guide, the rewriting model, and trained copies.

Everything starts at its first use: an evaluation that needs none of it starts none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from raycomplete.attacks.settings import AttackConfig, FinetuneAttack, PairAttack
from raycomplete.attacks.target import Attacker, AttackTools
from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint, resolve_checkpoint
from raycomplete.data.inputs import Models
from raycomplete.engines.cluster import uses_gpu
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.start import Engines, start_engine
from raycomplete.evaluation.attack_finetune import fine_tune, read_chats
from raycomplete.evaluation.white_box_actor import WhiteBoxClient
from raycomplete.runtime.console import Console
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.row_store import content_hash
from raycomplete.runtime.types import Generator

AttackT = TypeVar("AttackT", bound=AttackConfig)


def extra_engines(config: RunConfig) -> int:
    """Engines and models that the attacks and the judge of a run hold besides the generator."""
    names = {attack.name for attack in config.evaluation.attacks}
    white_boxes = config.evaluation.white_boxes if names & {"gcg", "random_search", "rank_assisted_prefill"} else 0
    if not white_boxes and "decoding" in names:
        white_boxes = 1
    pair = _settings(config, PairAttack)
    own_attacker = pair is not None and pair.attacker is not None
    return white_boxes + ("rank_assisted_prefill" in names) + own_attacker + (config.evaluation.judge.kind == "model")


def check_attacks(config: RunConfig) -> None:
    """Refuses what the attacks of a run file need and do not have, before anything is started.

    Raises:
        CheckpointError: The rewriting model is not there.
        ConfigError, DataError: Chats of the fine-tuning attack are missing or cannot be used.
    """
    finetune, pair = _settings(config, FinetuneAttack), _settings(config, PairAttack)
    if finetune is not None:
        for dataset in finetune.datasets:
            read_chats(config, finetune, dataset)
    if pair is not None and pair.attacker is not None:
        resolve_checkpoint(pair.attacker, role="attacker")


def training_workers(config: RunConfig) -> int:
    """Training workers that the fine-tuning attack needs."""
    return 1 if _settings(config, FinetuneAttack) is not None else 0


@dataclass
class AttackResources:
    """Tools of one evaluation; `stop` ends what was started, and `stopping` is asked while a copy is trained."""

    config: RunConfig
    models: Models
    engines: Engines
    folder: Path
    console: Console
    stopping: Callable[[], bool] = lambda: False
    use_gpu: bool = field(init=False)
    _boxes: list[WhiteBoxClient] = field(default_factory=list)
    _guide: WhiteBoxClient | None = None
    _attacker: Attacker | None = None
    _own: list[RolloutPool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.use_gpu = uses_gpu(self.config.cluster)

    def for_model(self, path: Path) -> AttackTools:
        """Tools for attacks on one checkpoint."""

        def white_boxes() -> Sequence[WhiteBoxClient]:
            if not self._boxes:
                count = self.config.evaluation.white_boxes
                self._boxes += [self._white_box(path, available_cpus() // count) for _ in range(count)]
            return [box.with_weights(path) for box in self._boxes]

        def trained(settings: FinetuneAttack, dataset: str) -> Generator:
            copy = fine_tune(
                self.config,
                settings,
                dataset,
                self.models.codec,
                path,
                self.folder,
                use_gpu=self.use_gpu,
                console=self.console,
                stopping=self.stopping,
            )
            return self.engines.generator.with_weights(str(copy))

        has_base = "base" in self.models.paths
        return AttackTools(
            white_boxes=white_boxes,
            guide=self._start_guide if has_base else None,
            guide_id=self.models.fingerprint("base") if has_base else "",
            attacker=self._start_attacker(),
            fine_tune=trained,
            fine_tune_ids=self._training_ids(),
        )

    def stop(self) -> None:
        """Ends what was started."""
        for box in (*self._boxes, *([self._guide] if self._guide else [])):
            box.stop()
        for engine in self._own:
            with suppress(Exception):  # an actor that is gone already must not hide why
                engine.stop()

    def _white_box(self, path: Path, threads: int) -> WhiteBoxClient:
        return WhiteBoxClient.start(self.config, path, use_gpu=self.use_gpu, threads=max(threads, 1))

    def _start_guide(self) -> WhiteBoxClient:
        if self._guide is None:
            self._guide = self._white_box(self.models.paths["base"], available_cpus())
        return self._guide

    def _start_attacker(self) -> Attacker | None:
        settings = _settings(self.config, PairAttack)
        if settings is None or self._attacker is not None:
            return self._attacker
        if settings.attacker is None:
            path, codec = self.models.paths["base"], self.models.codec
            generator = self.engines.generator.with_weights(str(path))
        else:
            path = resolve_checkpoint(settings.attacker, role="attacker")
            codec = ChatCodec(path, trust_remote_code=self.config.models.trust_remote_code)
            with self.console.stage("Engine of the rewriting model started"):
                generator = start_engine(self.config, path, codec)
                generator.wait_until_ready(self.config.cluster.start_timeout_s)
            self._own.append(generator)
        self._attacker = Attacker(fingerprint(path), generator, codec, self.config.models.max_length)
        return self._attacker

    def _training_ids(self) -> dict[str, str]:
        settings = _settings(self.config, FinetuneAttack)
        if settings is None:
            return {}
        return {
            dataset: content_hash([read_chats(self.config, settings, dataset), self.config.train.seed])
            for dataset in settings.datasets
        }


def _settings(config: RunConfig, kind: type[AttackT]) -> AttackT | None:
    return next((attack for attack in config.evaluation.attacks if isinstance(attack, kind)), None)
