"""Mistakes that a user can make, one a line, and the parts that each error message must have.

A case is a command that works, arguments that are added to it (later ones override), and, if the mistake is in a file,
the content of that file. The message names the field with its value, so most cases expect that part first.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

HALF = "\ud83d"
DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"


class Case(NamedTuple):
    """A command with one mistake, and parts of its error message.

    Attributes:
        command: the command without the mistake: a stage, `import` of `stage=annotate`, or `none`.
        words: arguments that are added to it, separated by blanks; `{file}` is the path of a file.
        says: parts of the error message.
        content: the content of the file; None for a valid file. Rows that begin with `{"` follow a valid row.
        of_model: the name of a model's file that gets the content, instead of the file of rows.
    """

    command: str
    words: str
    says: tuple[str, ...]
    content: bytes | None = None
    of_model: str = ""

    def __str__(self) -> str:
        return f"{self.command} {self.words or self.of_model or self.says[0]}"[:70]


def line(command: str, words: str, *says: str) -> Case:
    return Case(command, words, says)


def file(command: str, content: Any, *says: str, of_model: str = "") -> Case:
    """Build a case whose mistake is in a file: its bytes, its text, or a row of it."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content) + "\n").encode()
    return Case(command, "", says, content, of_model)


def turns(*contents: Any, **more: Any) -> list[dict[str, Any]]:
    """Build the messages of a conversation. The last one gets the fields of `more`."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*messages[:-1], {**messages[-1], **more}]


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    return {"messages": turns(*contents, **more)}


def pair(prompt: Any = "a", chosen: Any = "b", rejected: Any = "c", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def item(prompt: Any = "a", answers: Any = ("b", "c"), **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answers": answers, **more}


USER = turns("a")
ANSWER = [{"role": "assistant", "content": "b"}]
OTHER = [{"role": "assistant", "content": "c"}]

CASES = [
    # --- Arguments of a command line
    line("none", "seed=1", "stage=(missing)", "sft, full"),
    line("none", "stage=sfft", "stage=sfft", "Did you mean stage=sft?"),
    line("none", "stage=", "stage=(empty)"),
    line("none", "stage=[sft,ppo]", "stage=[sft,ppo]"),
    line("none", "sft", "argument=sft", "key=value"),
    line("none", "train stage=sft", "argument=train"),
    line("none", "--stage sft", "--stage", "is not an option"),
    line("none", "-m", "stage=(missing)"),
    line("none", "- stage=sft", "argument=-", "stands alone"),
    line("sft", "modell=pocket", "modell=pocket", "Did you mean model?"),
    line("sft", "model=pokket", "model=pokket", "Did you mean model=pocket?"),
    line("sft", "model=meta-llama/Llama-3.2-1B", "model=hub model.path=meta-llama/Llama-3.2-1B"),
    line("sft", "data=rows.jsonl", "data=files data.path=rows.jsonl"),
    line("sft", "data=alpaca", "data=alpaca", "jsonl"),
    line("sft", "method=dora", "method=dora", "full, lora, qlora"),
    line("sft", "method=full", "method=full", "stage=full"),
    line("sft", "track=tensorboard", "track=tensorboard", "wandb"),
    line("sft", "foo=1", "foo=1", "is not a key"),
    line("sft", "+foo=1", "argument=+foo=1"),
    line("sft", "~method", "argument=~method"),
    line("sft", "stage.lrr=3", "stage.lrr=3", "Did you mean stage.lr?"),
    line("sft", "learning_rate=1e-4", "learning_rate=1e-4", "stage.lr"),
    line("sft", "num_train_epochs=3", "num_train_epochs=3", "stage.epochs"),
    line("sft", "per_device_train_batch_size=2", "per_device_train_batch_size=2", "stage.micro_batch"),
    line("sft", "lora_r=8", "lora_r=8", "method.r"),
    line("sft", "method.lora_alpha=8", "method.lora_alpha=8", "method.alpha"),
    line("sft", "method.target_modules=[q_proj]", "method.target_modules=[q_proj]", "method.targets"),
    line("sft", "output_dir=out", "output_dir=out", "run.root"),
    line("sft", "bf16=true", "bf16=true", "dtype=bfloat16"),
    line("sft", "stage.kl_coef=0.1", "stage.kl_coef=0.1", "stage=ppo"),
    line("sft", "stage=3", "stage=3"),
    line("sft", "hydra.run.dir=out", "hydra.run.dir=out"),
    line("sft", "+experiment=mine", "experiment=mine"),
    line("sft", "--config-dir nowhere", "--config-dir=nowhere", "no such folder"),
    line("sft", "stage.lr=1e-3,1e-4", "stage.lr=1e-3,1e-4", "-m"),
    line("sft", "-m stage.lr=1e-3,abc", "stage.lr=abc"),
    line("sft", "seed=${nothing}", "seed=", "nothing"),
    # --- Values of settings
    line("sft", "stage.lr=abc", "stage.lr=abc", "is not a number"),
    line("sft", "stage.lr=0", "stage.lr=0", "is not above 0"),
    line("sft", "stage.lr=-1e-4", "stage.lr=-0.0001", "is not above 0"),
    line("sft", "stage.lr=nan", "stage.lr=nan"),
    line("sft", "stage.lr=inf", "stage.lr=inf"),
    line("sft", "stage.lr=[1,2]", "stage.lr=[1,2]"),
    line("sft", "stage.epochs=0", "stage.epochs=0", "is not above 0"),
    line("sft", "stage.max_steps=0", "stage.max_steps=0"),
    line("sft", "stage.max_steps=1.5", "stage.max_steps=1.5", "is not a whole number"),
    line("sft", "stage.batch_size=12 stage.micro_batch=8", "stage.batch_size=12", "stage.micro_batch=8"),
    line("sft", "stage.gradient_accumulation=0", "stage.gradient_accumulation=0"),
    line("sft", "stage.gradient_accumulation=4 stage.batch_size=24", "stage.batch_size=24", "Give one of the two"),
    line("sft", "stage.gradient_accumulation=4 stage.batch_size=16", "stage.batch_size=16", "Give one of the two"),
    line("sft", "data.on_bad_row=drop", "data.on_bad_row=drop", "error, skip"),
    line("sft", "stage.warmup=1", "stage.warmup=1"),
    line("sft", "stage.schedule=polynomial", "stage.schedule=polynomial", "constant, linear, cosine"),
    line("sft", "stage.optimiser=lion", "stage.optimiser=lion", "adamw"),
    line("sft", "stage.adam_beta1=1", "stage.adam_beta1=1"),
    line("sft", "stage.adam_beta2=-0.1", "stage.adam_beta2=-0.1"),
    line("sft", "stage.weight_decay=-1", "stage.weight_decay=-1"),
    line("sft", "stage.max_grad_norm=0", "stage.max_grad_norm=0"),
    line("sft", "stage.packing=maybe", "stage.packing=maybe", "true or false"),
    line("sft", "stage.publish=best", "stage.publish=best", "stage.eval_every"),
    line("sft", "stage.patience=2", "stage.patience=2", "stage.eval_every"),
    line("sft", "stage.eval_every=0", "stage.eval_every=0"),
    line("sft", "seed=-1", "seed=-1", "from 0 to 4294967295"),
    line("sft", "seed=4294967296", "seed=4294967296", "from 0 to 4294967295"),
    line("sft", "resume=yes", "resume=yes", "auto, never, must"),
    line("sft", "dtype=bf16", "dtype=bf16", "bfloat16"),
    line("sft", "dtype=int8", "dtype=int8"),
    line("sft", "device=quantum", "device=quantum", "auto, cpu, cuda"),
    line("sft", "device=cuda:99", "device=cuda:99"),
    line("sft", "schema_version=0", "schema_version=0"),
    line("sft", "run.name=a/b", "run.name=a/b", "without slashes"),
    line("sft", "run.name=..", "run.name=.."),
    line("sft", f"run.name={'x' * 300}", "run.name=xxx", "shorter"),
    line("sft", "run.root=https://h/x", "run.root=https://h/x"),
    line("sft", "run.root={file}/runs", "run.root=", "cannot be written"),
    line("sft", "method.r=0", "method.r=0"),
    line("sft", "method.alpha=-1", "method.alpha=-1"),
    line("sft", "method.dropout=1", "method.dropout=1"),
    line("sft", "method.targets=q_proj", "method.targets=q_proj", "no list of names of layers"),
    line("sft", "method.targets=[]", "method.targets=[]"),
    line("sft", "method.targets=[no_such_layer]", "method.targets=", "no_such_layer", "q_proj"),
    line("sft", "data.max_length=0", "data.max_length=0"),
    line("sft", "data.max_length=2", "data.max_length=2", "Raise data.max_length"),
    line("sft", "data.held_out=1.5", "data.held_out=1.5", "from 0 to 1"),
    line("sft", "data.held_out=1", "data.held_out=1", "to train on"),
    line("sft", "data.limit=0", "data.limit=0"),
    line("sft", "data.too_long=cut", "data.too_long=cut", "drop, truncate"),
    line("sft", "data.reasoning=drop", "data.reasoning=drop", "keep, mask, hide"),
    line("sft", "data.template=llama3", "data.template=llama3", "chatml"),
    line("sft", "data.template_kwargs=3", "data.template_kwargs=3"),
    line("sft", "data.eval_path=nowhere.jsonl data.held_out=0.05", "data.eval_path=nowhere.jsonl"),
    line("sft", "data.eval_path={file} data.held_out=0.2", "data.held_out=0.2", "Drop one of the two"),
    line("sft", "data.path=nowhere.jsonl", "data.path=nowhere.jsonl", "no such file"),
    line("sft", "data.path=*.parquet", "data.path=*.parquet", "matches no file"),
    line("sft", "data.path=/dev/null", "data.path=/dev/null", "is a device, not a file"),
    line("sft", "data.path={file}/more", "data.path=", "no such file"),
    line("sft", "data.path=hub:org/name", "data.path=org/name", "the hub cannot be reached"),
    line("sft", "data.path=hub:org", "data.path=hub:org", "hub:ORG/NAME/FILE"),
    line("sft", "data.eval_path=*.csv data.held_out=0.05", "data.eval_path=*.csv", "matches no file"),
    line("sft", "data=annotations", "data=annotations", "data=files"),
    line("sft", "model=base model.path=null", "model", "Add model=hub model.path=ORG/NAME"),
    line("sft", "model.path=./nowhere", "model.path=./nowhere", "no such folder"),
    line("sft", "model.path=org/nowhere", "model.path=org/nowhere", "the hub cannot be reached"),
    line("sft", "model.path={file}", "model.path="),
    line("sft", "init=sft:nothing", "init=sft:nothing"),
    line("sample", "stage.candidates=1", "stage.candidates=1", "2 to 9"),
    line("sample", "stage.candidates=10", "stage.candidates=10", "2 to 9"),
    line("sample", "stage.prompts=0", "stage.prompts=0"),
    line("sample", "rollout.max_new_tokens=0", "rollout.max_new_tokens=0"),
    line("sample", "rollout.temperature=0", "rollout.temperature=0"),
    line("sample", "rollout.top_p=0.9", "rollout.top_p=0.9", "rollout.temperature"),
    line("sample", "rollout.engine=sglang", "rollout.engine=sglang"),
    line("sample", "rollout.engine=vllm", "rollout.python=auto", "VENV/bin/python"),
    line("sample", "rollout.reasoning=mask", "rollout.reasoning=mask", "keep, hide"),
    line("sample", "project=a/b", "project=a/b"),
    line("sample", "init=sft:nothing", "init=sft:nothing", "python -m align stage=sft"),
    line("sample", "init=sft", "init=sft", "STAGE:latest"),
    line("sample", "init=nowhere/artifact", "init=nowhere/artifact"),
    line("sample", "init=reward:a", "init=reward:a"),
    line("sample", "method=full", "method=full", "was trained with method="),
    line("sample", "method.r=4", "method.r=4"),
    line("reward", "stage.held_out=1", "stage.held_out=1"),
    line("reward", "stage.held_out=0", "stage.held_out=0"),
    line("reward", "method.lr=1e-3", "method.lr=1e-3", "Write stage.lr=1e-3"),
    line("reward", "stage.prioritise=true", "stage.prioritise=", "data=annotations"),
    line("dpo", "stage.beta=0", "stage.beta=0"),
    line("dpo", "stage.loss=hinge", "stage.loss=hinge", "sigmoid, ipo, orpo, simpo"),
    line("dpo", "stage.label_smoothing=0.5", "stage.label_smoothing=0.5"),
    line("dpo", "stage.loss=ipo stage.label_smoothing=0.1", "stage.label_smoothing=0.1", "stage.loss=sigmoid"),
    line("dpo", "stage.simpo_gamma=2", "stage.simpo_gamma=2", "stage.loss=simpo"),
    line("kto", "stage.beta=0", "stage.beta=0"),
    line("kto", "stage.micro_batch=1", "stage.micro_batch=1", "Use 2 or more"),
    line("kto", "stage.undesirable_weight=-1", "stage.undesirable_weight=-1"),
    line("ppo", "stage.batch_size=64 stage.minibatches=3", "stage.batch_size=64", "stage.minibatches=3"),
    line("ppo", "devices=0", "devices=0"),
    line("ppo", "devices=3", "stage.batch_size=8", "stage.batch_size / stage.minibatches = 4 is not a multiple"),
    line("ppo", "devices=2", "stage.micro_batch=4", "2 ranks of 4 rows each do not divide the 4"),
    line("ppo", "stage.gamma=1.1", "stage.gamma=1.1"),
    line("ppo", "stage.gamma=0", "stage.gamma=0"),
    line("ppo", "stage.lam=-1", "stage.lam=-1"),
    line("ppo", "stage.kl_coef=-0.1", "stage.kl_coef=-0.1"),
    line("ppo", "stage.init_kl_coef=0.1", "stage.init_kl_coef=0.1", "stage.kl_coef"),
    line("ppo", "stage.kl_estimator=k2", "stage.kl_estimator=k2", "k1", "stage.kl_in=loss"),
    line("ppo", "stage.kl_estimator=k3", "stage.kl_estimator=k3", "k1", "stage.kl_in=loss"),
    line("ppo", "stage.cliprange=0.2", "stage.cliprange=0.2", "stage.clip_range"),
    line("ppo", "stage.clip_range=0", "stage.clip_range=0"),
    line("ppo", "stage.normalise=always", "stage.normalise=always", "once, running, off"),
    line("ppo", "stage.value_backbone=shared", "stage.value_backbone=shared", "own, policy, frozen"),
    line("ppo", "stage.tripwires.action=abort", "stage.tripwires.action=abort", "warn, stop"),
    line("ppo", "stage.tripwires.klx=3", "stage.tripwires.klx=3", "stage.tripwires.kl"),
    line("ppo", "reward=lerned", "reward=lerned", "learned"),
    line("ppo", "reward.ref=reward:nothing", "reward.ref=reward:nothing"),
    line("ppo", "reward.ref=sft:s", "reward.ref=sft:s", "no reward model"),
    line("ppo", "init=reward:a", "init=reward:a"),
    line("ppo", "reward=ensemble", "reward.refs"),
    line("ppo", "reward=sum", "reward.parts"),
    line("ppo", "reward=sum reward.parts=[{name:lerned}]", "reward.parts", "lerned"),
    line("ppo", "reward=rules", "reward.rules"),
    line("ppo", "reward=rules reward.rules=[{rule:lenght}]", "reward.rules", "lenght", "length"),
    line("ppo", "reward=rules reward.rules=[{rule:regex,pattern:'('}]", "reward.rules", "pattern"),
    line("ppo", "reward=rules reward.rules=[{rule:length,low:9,high:3}]", "reward.rules"),
    line("ppo", "reward=fn", "reward.fn"),
    line("ppo", "reward=fn reward.fn=nowhere:score", "reward.fn=nowhere:score"),
    line("ppo", "reward=fn reward.fn=json:score", "reward.fn=json:score", "score"),
    line("ppo", "reward=fn reward.fn=json", "reward.fn=json", "package.module:name"),
    line("ppo", "reward=fn reward.fn=json:dumps reward.timeout=0", "reward.timeout=0"),
    line("ppo", "reward=fn reward.fn=json:dumps", "reward.fn=json:dumps", "not a number for each"),
    line("ppo", "reward=check reward.check={kind:exakt}", "reward.check.kind=exakt", "exact"),
    line("ppo", "reward=check", "check=(missing)", "the row does not say"),
    line("eval", "artifact=ppo:nothing", "artifact=ppo:nothing", "python -m align stage=ppo"),
    line("eval", "artifact=reward:a", "artifact=reward:a"),
    line("eval", "stage.prompts=0", "stage.prompts=0"),
    line("eval", "reward.name=learned", "reward.name=learned", "reward=learned"),
    line("eval", "stage.seen=keep", "stage.seen=keep", "drop, report"),
    line("export", "artifact=sft:nothing", "artifact=sft:nothing"),
    line("export", "export=onnx", "export=onnx", "adapter, all, check, gguf, merged"),
    line("export", "export.dtype=int4", "export.dtype=int4", "bfloat16"),
    line("export", "export.require=[tgi]", "export.require=", "tgi"),
    line("export", "export=gguf export.quantised=[q2_k]", "export.quantised=", "q2_k"),
    line("export", "export=check", "export.path"),
    line("export", "export=check export.path=nowhere", "export.path=nowhere"),
    line("import", "stage.action=imprt", "stage.action=imprt", "import"),
    line("import", "stage.path=nowhere.jsonl", "stage.path=nowhere.jsonl", "no such file"),
    line("import", "stage.path=null", "stage.path="),
    line("import", "stage.port=80", "stage.port=80", "1024 to 65535"),
    line("import", "stage.agreement=0.5", "stage.agreement=0.5"),
    line("import", "store.url=mongodb://h/x", "store.url="),
    line("import", "store.url=sqlite://", "store.url=sqlite://", "in memory"),
    line("import", "stage.action=configure stage.settings={answers:x}", "settings"),
    line("import", "stage.action=verify project=nothing", "project=nothing"),
    # --- Annotation
    line("import", "devices=2", "devices=2", "stage=annotate works in one process"),
    line("import", "stage.action=configure", "stage.action=configure", "names no change"),
    line("import", "stage.action=restore stage.path=nowhere", "stage.path=nowhere"),
    line("import", "stage.action=export project=q", "project=q"),
    line("import", "stage.action=configure stage.settings=3", "stage.settings=3", "is no mapping"),
    line("import", "stage.action=configure stage.settings={overlapp:2}", "there is no such setting"),
    line("import", "stage.action=configure stage.state=asleep", "state=asleep", "there is no such state"),
    line("import", "stage.action=configure stage.guidelines=.", "stage.guidelines=.", "is a folder, not a file"),
    line("import", "stage.action=erase", "erases an item, an annotator or a whole project"),
    line("import", "stage.action=erase stage.item=i stage.annotator=a", "an item, an annotator or a whole project"),
    line("import", "stage.action=erase stage.item=nope project=default", "item=nope", "has no such item"),
    line("import", "stage.action=erase stage.annotator=nobody project=default", "no such annotator"),
    line("import", "stage.action=verify stage.head=nowhere project=default", "stage.head=nowhere"),
    line("import", "stage.action=serve stage.demo=true stage.host=0.0.0.0 stage.url=https://a.example", "stage.host"),
    line("import", "stage.action=serve stage.demo=true stage.url=https://a.example", "stage.url"),
    line("import", "stage.action=serve stage.host=0.0.0.0", "stage.url"),
    line("import", "stage.action=serve stage.url=https://a.example/path", "stage.url"),
    line("import", "stage.action=serve stage.url=a.example", "stage.url"),
    line("import", "stage.action=invite stage.role=owner", "stage.role=owner"),
    # --- Data sets
    line("data", "stage.sources=null", "stage.sources=None"),
    line("data", "stage.sources=[{path:nowhere.jsonl}]", "nowhere.jsonl"),
    line("data", "stage.sources=[{pth:a}]", "pth=a", "Did you mean path?"),
    line("data", "stage.sources=[{path:{file},weight:-1}]", "weight=-1", "is no share"),
    line("data", "stage.sources=[{file},{path:{file},weight:1}]", "leave nothing of 1"),
    line("data", "stage.mix.total=100000", "stage.mix.repeat="),
    line("data", "stage.duplicates.prefer=[other]", "prefer=other", "is no source"),
    line("data", "stage.clean=[unicod]", "unicod", "is no cleaning step"),
    line("data", "stage.clean=[{length:{leest:3}}]", "leest", "there is no such argument"),
    line("data", "stage.clean=[{length:{least:999}}]", "is empty after cleaning"),
    line("data", "stage.clean=[unicode,{score:{by:loss}}]", "Write stage.score.by=loss or stage.score.by=reward."),
    line("data", "stage.split.by=time", "stage.split.since=None"),
    line("data", "stage.split.by=time stage.split.since=yesterday", "yesterday"),
    line("data", "stage.split.by=column", "split", "a column that no row has"),
    line("data", "data=jsonl data.path={file}", "is given beside stage.sources"),
    line("data", "stage.sources=null data=annotations", "is no source of a data set"),
    line("data", "stage.workers=2", "stage.workers=2", "stage.engine=embedded has none"),
    line("data", "stage.engine=daft stage.ray=auto", "stage.ray=auto", "stage.engine=daft"),
    line("data", "stage.engine=spark", "stage.engine=spark", "embedded, daft, ray"),
    line("data", "stage.score.by=loss", "model=(not given)", "stage.score.by=loss"),
    line("data", "stage.score.by=los", "stage.score.by=los"),
    line("data", "stage.score.by=reward run.root={file}.runs", "reward.ref=reward:latest"),
    line("data", "stage.score.keep=[0.1,0.9]", "has no effect without stage.score.by"),
    line("data", "stage.score.by=reward stage.score.keep=[0.9,0.1]", "are no two quantiles"),
    line("data", "stage.score.by=reward stage.score.keep=[0.9]", "are no two quantiles"),
    line("data", "stage.score.by=reward stage.score.least=2 stage.score.most=1", "is more than stage.score.most=1"),
    line("data", "reward=sentiment", "reward=sentiment", "without stage.score.by=reward"),
    line("data", "reward.ref=reward:best", "reward=learned", "without stage.score.by=reward"),
    line("sft", "data=manifest data.path=data:latest", "no finished data run"),
    line("sft", "data=manifest data.path=nowhere", "data.path=nowhere"),
    # --- Training
    line("sft", "device=cpu:7", "device=cpu:7"),
    line("sft", "run.name=a\x1bb", "run.name="),
    line("sft", "stage.optimiser=adamw_8bit", "stage.optimiser=adamw_8bit", "keeps its moments in 8 bits"),
    line("sft", "stage.eval_every=2 data.held_out=0", "stage.eval_every=2", "Raise data.held_out"),
    line("ppo", "stage.advantage=grpo stage.group_size=1", "stage.group_size=1"),
    line("ppo", "stage.advantage=rloo stage.group_size=3", "stage.batch_size=8"),
    line("ppo", "stage.advantage=rloo stage.group_size=2 stage.lam=0.9", "stage.lam=0.9"),
    line("ppo", "stage.advantage=rloo stage.group_size=2 stage.gamma=0.9", "stage.gamma=0.9"),
    line("ppo", "stage.scale_rewards=none", "stage.scale_rewards=none"),
    line("ppo", "stage.advantage=grpo stage.group_size=2 stage.kl_in=reward", "stage.kl_in=reward"),
    line("ppo", "stage.max_draws=2", "stage.max_draws=2"),
    line("ppo", "stage.importance_sampling_level=sequence", "stage.importance_sampling_level=sequence"),
    line("ppo", "stage.advantage=grpo stage.group_size=2 stage.kl_estimator=k1", "stage.kl_estimator=k1"),
    # --- Best of n
    line("sample", "stage.best_of=1", "stage.best_of=1", "from 2 to 4096"),
    line("sample", "stage.best_of=4 stage.candidates=3", "stage.candidates=3", "for people", "Drop it"),
    line("sample", "stage.gold={name:sentiment}", "stage.gold", "Add stage.best_of=N"),
    line("sample", "stage.best_of=4 stage.gold=vader", "stage.gold=vader", "is no mapping"),
    line("sample", "stage.best_of=4 stage.gold={name:magic}", "stage.gold.name=magic"),
    line("sample", "stage.best_of=4 reward=sentiment stage.gold={name:sentiment}", "stage.gold=vader", "also ranks"),
    line("sample", "stage.best_of=4 reward.ref=reward:none", "reward.ref=reward:none", "python -m align stage=reward"),
    line("sample", "stage.best_of=4 reward.ref=sft:s", "reward.ref=sft:s", "is no reward model"),
    line("sample", "stage.best_of=4 reward=sentiment stage.gold={name:check}", "check=(missing)"),
    # --- Evaluations of several systems
    line("suite", "stage.systems={a:sft:s}", "are not two"),
    line("suite", "stage.systems={}", "are not two"),
    line("suite", "stage.systems=sft:s", "stage.systems=sft:s", "is no mapping"),
    line("suite", "stage.systems={a:sft:s,b:sft:s}", "is the same as a"),
    line("suite", "stage.systems={a:sft:s,b:nobody:x}", "stage.systems.b"),
    line("suite", "stage.systems={a:sft:s,b:sft:nobody}", "stage.systems.b"),
    line("suite", "stage.systems={a:sft:s,b:reward:a}", "is a reward model"),
    line("suite", "stage.systems={a:sft:s,_b:base}", "cannot be a name"),
    line("suite", "stage.systems={a:sft:s,b:{file:nothing.jsonl}}", "stage.systems.b.file"),
    line("suite", "stage.systems={a:sft:s,b:{folder:x}}", "names no system"),
    line("suite", "stage.first=c", "stage.first=c"),
    line("suite", "eval.tasks=[]", "is no list of tasks"),
    line("suite", "eval.tasks=[{path:x.jsonl}]", "eval.tasks[0].name"),
    line("suite", "eval.tasks=[{name:x,prompt:3}]", "is not a key here"),
    line("suite", "eval.tasks=[{name:x,prompts:0}]", "eval.tasks[0].prompts"),
    line("suite", "eval.tasks=[{name:x},{name:x}]", "stands there twice"),
    line("suite", "eval.tasks=[{name:x,check:{kind:magic}}]", "eval.tasks[0].check"),
    line("suite", "eval.tasks=[{name:x,path:nothing.jsonl}]", "eval.tasks, x"),
    line("suite", "artifact=sft:s", "artifact=sft:s"),
    line("suite", "init=base", "init=base"),
    line("suite", "stage.seen=report", "stage.seen=report"),
    line("eval", "stage.answers=2", "stage.answers=2"),
    line("eval", "eval.gates=[{name:g,task:t,is:superior}]", "eval.gates"),
    line("eval", "eval.tasks=[{name:t,path:nothing.jsonl}]", "eval.tasks"),
    # --- Cards of judges
    *(
        line("judge", word, word.partition("=")[0])
        for word in (
            "stage.systems={a:sft:s,b:base}",
            "stage.prompts=3",
            "stage.seen=report",
            "stage.card=eval:x",
            "artifact=sft:s",
            "init=base",
            "eval.tasks=[{name:chat,prompts:8}]",
            "eval.gates=[{name:g,task:chat,is:superior}]",
            "method=lora",
            "rollout.max_new_tokens=3",
            "data.eval_path=x.jsonl",
            "data.reasoning=mask",
        )
    ),
    line("judge", "data=chitchat data.path=null", "holds no preference pairs"),
    line("judge", "stage.judge=people data=annotations data.path=null", "are whom a judge is measured against"),
    line("export", "export.require=[llama.cpp]", "export.require=llama.cpp", "export=adapter does not ask it"),
    line("export", "export.into=nf4", "export.into=nf4"),
    # --- Plans
    line("none", "stage=plan stage.of=pppo", "stage.of=pppo", "Did you mean stage.of=ppo?"),
    line("none", "stage=plan stage.of=serve", "stage.of=serve", "is no stage that is planned"),
    line("none", "stage=plan stage.card=0", "stage.card=0.0"),
    line("none", "stage=plan stage.card=inf", "stage.card=inf"),
    line("none", "stage=plan stage.throughput=1e-300", "stage.throughput=1e-300"),
    line("none", "stage=plan stage.throughput=nan", "stage.throughput=nan"),
    line("none", "stage=plan stage.answers=1", "stage.answers=1"),
    # --- Files of a model
    *(
        file("sft", content, *parts, of_model=name)
        for name, content, parts in (
            ("config.json", "{", ("config.json", "is not JSON")),
            ("config.json", "[]", ("config.json",)),
            ("config.json", {"model_type": "no_such_type"}, ("no_such_type",)),
            ("config.json", {"model_type": "bert"}, ("bert",)),
            ("generation_config.json", "{", ("generation_config.json",)),
            ("tokenizer.json", "{", ("tokenizer",)),
            ("tokenizer_config.json", "3", ("tokenizer",)),
            ("model.safetensors", b"", ("model.path=", "corrupt")),
            ("model.safetensors", b"\xff" * 64, ("model.path=", "corrupt")),
            ("chat_template.jinja", "{% for %}", ("chat template",)),
            ("chat_template.jinja", "{{ messages[9].content }}", ("chat template",)),
            ("chat_template.jinja", "{{ 1 // 0 }}", ("chat template",)),
            ("chat_template.jinja", "always the same", ("chat template",)),
        )
    ),
]
