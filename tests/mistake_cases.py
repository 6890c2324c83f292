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


def build_case(command: str, words: str, *says: str) -> Case:
    return Case(command, words, says)


def build_file_case(command: str, content: Any, *says: str, of_model: str = "") -> Case:
    """Build a case whose mistake is in a file: its bytes, its text, or a row of it."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content) + "\n").encode()
    return Case(command, "", says, content, of_model)


def build_turns(*contents: Any, **more: Any) -> list[dict[str, Any]]:
    """Build the messages of a conversation. The last one gets the fields of `more`."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*messages[:-1], {**messages[-1], **more}]


def build_chat_row(*contents: Any, **more: Any) -> dict[str, Any]:
    return {"messages": build_turns(*contents, **more)}


def build_pair_row(prompt: Any = "a", chosen: Any = "b", rejected: Any = "c", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def build_answers_row(prompt: Any = "a", answers: Any = ("b", "c"), **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answers": answers, **more}


USER = build_turns("a")
ANSWER = [{"role": "assistant", "content": "b"}]
OTHER = [{"role": "assistant", "content": "c"}]

CASES = [
    # --- Arguments of a command line
    build_case("none", "seed=1", "stage=(missing)", "sft, full"),
    build_case("none", "stage=sfft", "stage=sfft", "Did you mean stage=sft?"),
    build_case("none", "stage=", "stage=(empty)"),
    build_case("none", "stage=[sft,ppo]", "stage=[sft,ppo]"),
    build_case("none", "sft", "argument=sft", "key=value"),
    build_case("none", "train stage=sft", "argument=train"),
    build_case("none", "--stage sft", "--stage", "is not an option"),
    build_case("none", "-m", "stage=(missing)"),
    build_case("none", "- stage=sft", "argument=-", "stands alone"),
    build_case("sft", "modell=pocket", "modell=pocket", "Did you mean model?"),
    build_case("sft", "model=pokket", "model=pokket", "Did you mean model=pocket?"),
    build_case("sft", "model=meta-llama/Llama-3.2-1B", "model=hub model.path=meta-llama/Llama-3.2-1B"),
    build_case("sft", "data=rows.jsonl", "data=files data.path=rows.jsonl"),
    build_case("sft", "data=alpaca", "data=alpaca", "jsonl"),
    build_case("sft", "method=dora", "method=dora", "full, lora, qlora"),
    build_case("sft", "method=full", "method=full", "stage=full"),
    build_case("sft", "track=tensorboard", "track=tensorboard", "wandb"),
    build_case("sft", "foo=1", "foo=1", "is not a key"),
    build_case("sft", "+foo=1", "argument=+foo=1"),
    build_case("sft", "~method", "argument=~method"),
    build_case("sft", "stage.lrr=3", "stage.lrr=3", "Did you mean stage.lr?"),
    build_case("sft", "learning_rate=1e-4", "learning_rate=1e-4", "stage.lr"),
    build_case("sft", "num_train_epochs=3", "num_train_epochs=3", "stage.epochs"),
    build_case("sft", "per_device_train_batch_size=2", "per_device_train_batch_size=2", "stage.micro_batch"),
    build_case("sft", "lora_r=8", "lora_r=8", "method.r"),
    build_case("sft", "method.lora_alpha=8", "method.lora_alpha=8", "method.alpha"),
    build_case("sft", "method.target_modules=[q_proj]", "method.target_modules=[q_proj]", "method.targets"),
    build_case("sft", "output_dir=out", "output_dir=out", "run.root"),
    build_case("sft", "bf16=true", "bf16=true", "dtype=bfloat16"),
    build_case("sft", "stage.kl_coef=0.1", "stage.kl_coef=0.1", "stage=ppo"),
    build_case("sft", "stage=3", "stage=3"),
    build_case("sft", "hydra.run.dir=out", "hydra.run.dir=out"),
    build_case("sft", "+experiment=mine", "experiment=mine"),
    build_case("sft", "--config-dir nowhere", "--config-dir=nowhere", "no such folder"),
    build_case("sft", "stage.lr=1e-3,1e-4", "stage.lr=1e-3,1e-4", "-m"),
    build_case("sft", "-m stage.lr=1e-3,abc", "stage.lr=abc"),
    build_case("sft", "seed=${nothing}", "seed=", "nothing"),
    # --- Values of settings
    build_case("sft", "stage.lr=abc", "stage.lr=abc", "is not a number"),
    build_case("sft", "stage.lr=0", "stage.lr=0", "is not above 0"),
    build_case("sft", "stage.lr=-1e-4", "stage.lr=-0.0001", "is not above 0"),
    build_case("sft", "stage.lr=nan", "stage.lr=nan"),
    build_case("sft", "stage.lr=inf", "stage.lr=inf"),
    build_case("sft", "stage.lr=[1,2]", "stage.lr=[1,2]"),
    build_case("sft", "stage.epochs=0", "stage.epochs=0", "is not above 0"),
    build_case("sft", "stage.max_steps=0", "stage.max_steps=0"),
    build_case("sft", "stage.max_steps=1.5", "stage.max_steps=1.5", "is not a whole number"),
    build_case("sft", "stage.batch_size=12 stage.micro_batch=8", "stage.batch_size=12", "stage.micro_batch=8"),
    build_case("sft", "stage.gradient_accumulation=0", "stage.gradient_accumulation=0"),
    build_case(
        "sft", "stage.gradient_accumulation=4 stage.batch_size=24", "stage.batch_size=24", "Give one of the two"
    ),
    build_case(
        "sft", "stage.gradient_accumulation=4 stage.batch_size=16", "stage.batch_size=16", "Give one of the two"
    ),
    build_case("sft", "data.on_bad_row=drop", "data.on_bad_row=drop", "error, skip"),
    build_case("sft", "stage.warmup=1", "stage.warmup=1"),
    build_case("sft", "stage.schedule=polynomial", "stage.schedule=polynomial", "constant, linear, cosine"),
    build_case("sft", "stage.optimiser=lion", "stage.optimiser=lion", "adamw"),
    build_case("sft", "stage.adam_beta1=1", "stage.adam_beta1=1"),
    build_case("sft", "stage.adam_beta2=-0.1", "stage.adam_beta2=-0.1"),
    build_case("sft", "stage.weight_decay=-1", "stage.weight_decay=-1"),
    build_case("sft", "stage.max_grad_norm=0", "stage.max_grad_norm=0"),
    build_case("sft", "stage.packing=maybe", "stage.packing=maybe", "true or false"),
    build_case("sft", "stage.publish=best", "stage.publish=best", "stage.eval_every"),
    build_case("sft", "stage.patience=2", "stage.patience=2", "stage.eval_every"),
    build_case("sft", "stage.eval_every=0", "stage.eval_every=0"),
    build_case("sft", "seed=-1", "seed=-1", "from 0 to 4294967295"),
    build_case("sft", "seed=4294967296", "seed=4294967296", "from 0 to 4294967295"),
    build_case("sft", "resume=yes", "resume=yes", "auto, never, must"),
    build_case("sft", "dtype=bf16", "dtype=bf16", "bfloat16"),
    build_case("sft", "dtype=int8", "dtype=int8"),
    build_case("sft", "device=quantum", "device=quantum", "auto, cpu, cuda"),
    build_case("sft", "device=cuda:99", "device=cuda:99"),
    build_case("sft", "schema_version=0", "schema_version=0"),
    build_case("sft", "run.name=a/b", "run.name=a/b", "without slashes"),
    build_case("sft", "run.name=..", "run.name=.."),
    build_case("sft", f"run.name={'x' * 300}", "run.name=xxx", "shorter"),
    build_case("sft", "run.root=https://h/x", "run.root=https://h/x"),
    build_case("sft", "run.root={file}/runs", "run.root=", "cannot be written"),
    build_case("sft", "method.r=0", "method.r=0"),
    build_case("sft", "method.alpha=-1", "method.alpha=-1"),
    build_case("sft", "method.dropout=1", "method.dropout=1"),
    build_case("sft", "method.targets=q_proj", "method.targets=q_proj", "no list of names of layers"),
    build_case("sft", "method.targets=[]", "method.targets=[]"),
    build_case("sft", "method.targets=[no_such_layer]", "method.targets=", "no_such_layer", "q_proj"),
    build_case("sft", "data.max_length=0", "data.max_length=0"),
    build_case("sft", "data.max_length=2", "data.max_length=2", "Raise data.max_length"),
    build_case("sft", "data.held_out=1.5", "data.held_out=1.5", "from 0 to 1"),
    build_case("sft", "data.held_out=1", "data.held_out=1", "to train on"),
    build_case("sft", "data.limit=0", "data.limit=0"),
    build_case("sft", "data.too_long=cut", "data.too_long=cut", "drop, truncate"),
    build_case("sft", "data.reasoning=drop", "data.reasoning=drop", "keep, mask, hide"),
    build_case("sft", "data.template=llama3", "data.template=llama3", "chatml"),
    build_case("sft", "data.template_kwargs=3", "data.template_kwargs=3"),
    build_case("sft", "data.eval_path=nowhere.jsonl data.held_out=0.05", "data.eval_path=nowhere.jsonl"),
    build_case("sft", "data.eval_path={file} data.held_out=0.2", "data.held_out=0.2", "Drop one of the two"),
    build_case("sft", "data.path=nowhere.jsonl", "data.path=nowhere.jsonl", "no such file"),
    build_case("sft", "data.path=*.parquet", "data.path=*.parquet", "matches no file"),
    build_case("sft", "data.path=/dev/null", "data.path=/dev/null", "is a device, not a file"),
    build_case("sft", "data.path={file}/more", "data.path=", "no such file"),
    build_case("sft", "data.path=hub:org/name", "data.path=org/name", "the hub cannot be reached"),
    build_case("sft", "data.path=hub:org", "data.path=hub:org", "hub:ORG/NAME/FILE"),
    build_case("sft", "data.eval_path=*.csv data.held_out=0.05", "data.eval_path=*.csv", "matches no file"),
    build_case("sft", "data=annotations", "data=annotations", "data=files"),
    build_case("sft", "data.annotators=[ann]", "data.annotators=", "with data=annotations"),
    build_case("reward", "data.exclude_annotators=[bob]", "data.exclude_annotators=", "with data=annotations"),
    build_case("ppo", "data.min_gold_accuracy=0.5", "data.min_gold_accuracy=0.5", "stage.action=quarantine"),
    build_case("ppo", "data.soft_labels=true", "data.soft_labels=", "stage=reward, dpo and kto"),
    build_case("dpo", "data.soft_labels=true stage.loss=ipo", "data.soft_labels=", "stage.loss=sigmoid"),
    build_case("reward", "data.min_gold_accuracy=1.5", "data.min_gold_accuracy=1.5"),
    build_case("sft", "model=base model.path=null", "model", "Add model=hub model.path=ORG/NAME"),
    build_case("sft", "model.path=./nowhere", "model.path=./nowhere", "no such folder"),
    build_case("sft", "model.path=org/nowhere", "model.path=org/nowhere", "the hub cannot be reached"),
    build_case("sft", "model.path={file}", "model.path="),
    build_case("sft", "init=sft:nothing", "init=sft:nothing"),
    build_case("sample", "stage.candidates=1", "stage.candidates=1", "2 to 9"),
    build_case("sample", "stage.candidates=10", "stage.candidates=10", "2 to 9"),
    build_case("sample", "stage.prompts=0", "stage.prompts=0"),
    build_case("sample", "rollout.max_new_tokens=0", "rollout.max_new_tokens=0"),
    build_case("sample", "rollout.temperature=0", "rollout.temperature=0"),
    build_case("sample", "rollout.top_p=0.9", "rollout.top_p=0.9", "rollout.temperature"),
    build_case("sample", "rollout.engine=sglang", "rollout.engine=sglang"),
    build_case("sample", "rollout.engine=vllm", "rollout.python=auto", "VENV/bin/python"),
    build_case("sample", "rollout.reasoning=mask", "rollout.reasoning=mask", "keep, hide"),
    build_case("sample", "project=a/b", "project=a/b"),
    build_case("sample", "init=sft:nothing", "init=sft:nothing", "python -m align stage=sft"),
    build_case("sample", "init=sft", "init=sft", "STAGE:latest"),
    build_case("sample", "init=nowhere/artifact", "init=nowhere/artifact"),
    build_case("sample", "init=reward:a", "init=reward:a"),
    build_case("sample", "method=full", "method=full", "was trained with method="),
    build_case("sample", "method.r=4", "method.r=4"),
    build_case("reward", "stage.held_out=1", "stage.held_out=1"),
    build_case("reward", "stage.held_out=0", "stage.held_out=0"),
    build_case("reward", "method.lr=1e-3", "method.lr=1e-3", "Write stage.lr=1e-3"),
    build_case("dpo", "stage.beta=0", "stage.beta=0"),
    build_case("dpo", "stage.loss=hinge", "stage.loss=hinge", "sigmoid, ipo, orpo, simpo"),
    build_case("dpo", "stage.label_smoothing=0.5", "stage.label_smoothing=0.5"),
    build_case("dpo", "stage.loss=ipo stage.label_smoothing=0.1", "stage.label_smoothing=0.1", "stage.loss=sigmoid"),
    build_case("dpo", "stage.simpo_gamma=2", "stage.simpo_gamma=2", "stage.loss=simpo"),
    build_case("kto", "stage.beta=0", "stage.beta=0"),
    build_case("kto", "stage.micro_batch=1", "stage.micro_batch=1", "Use 2 or more"),
    build_case("kto", "stage.undesirable_weight=-1", "stage.undesirable_weight=-1"),
    build_case("ppo", "stage.batch_size=64 stage.minibatches=3", "stage.batch_size=64", "stage.minibatches=3"),
    build_case("ppo", "devices=0", "devices=0"),
    build_case("ppo", "devices=3", "stage.batch_size=8", "stage.batch_size / stage.minibatches = 4 is not a multiple"),
    build_case("ppo", "devices=2", "stage.micro_batch=4", "2 ranks of 4 rows each do not divide the 4"),
    build_case("ppo", "stage.gamma=1.1", "stage.gamma=1.1"),
    build_case("ppo", "stage.gamma=0", "stage.gamma=0"),
    build_case("ppo", "stage.lam=-1", "stage.lam=-1"),
    build_case("ppo", "stage.kl_coef=-0.1", "stage.kl_coef=-0.1"),
    build_case("ppo", "stage.init_kl_coef=0.1", "stage.init_kl_coef=0.1", "stage.kl_coef"),
    build_case("ppo", "stage.kl_estimator=k2", "stage.kl_estimator=k2", "k1", "stage.kl_in=loss"),
    build_case("ppo", "stage.kl_estimator=k3", "stage.kl_estimator=k3", "k1", "stage.kl_in=loss"),
    build_case("ppo", "stage.cliprange=0.2", "stage.cliprange=0.2", "stage.clip_range"),
    build_case("ppo", "stage.clip_range=0", "stage.clip_range=0"),
    build_case("ppo", "stage.normalise=always", "stage.normalise=always", "once, running, off"),
    build_case("ppo", "stage.value_backbone=shared", "stage.value_backbone=shared", "own, policy, frozen"),
    build_case("ppo", "stage.tripwires.action=abort", "stage.tripwires.action=abort", "warn, stop"),
    build_case("ppo", "stage.tripwires.klx=3", "stage.tripwires.klx=3", "stage.tripwires.kl"),
    build_case("ppo", "reward=lerned", "reward=lerned", "learned"),
    build_case("ppo", "reward.ref=reward:nothing", "reward.ref=reward:nothing"),
    build_case("ppo", "reward.ref=sft:s", "reward.ref=sft:s", "no reward model"),
    build_case("ppo", "init=reward:a", "init=reward:a"),
    build_case("ppo", "reward=ensemble", "reward.refs"),
    build_case("ppo", "reward=sum", "reward.parts"),
    build_case("ppo", "reward=sum reward.parts=[{name:lerned}]", "reward.parts", "lerned"),
    build_case("ppo", "reward=rules", "reward.rules"),
    build_case("ppo", "reward=rules reward.rules=[{rule:lenght}]", "reward.rules", "lenght", "length"),
    build_case("ppo", "reward=rules reward.rules=[{rule:regex,pattern:'('}]", "reward.rules", "pattern"),
    build_case("ppo", "reward=rules reward.rules=[{rule:length,low:9,high:3}]", "reward.rules"),
    build_case("ppo", "reward=fn", "reward.fn"),
    build_case("ppo", "reward=fn reward.fn=nowhere:score", "reward.fn=nowhere:score"),
    build_case("ppo", "reward=fn reward.fn=json:score", "reward.fn=json:score", "score"),
    build_case("ppo", "reward=fn reward.fn=json", "reward.fn=json", "package.module:name"),
    build_case("ppo", "reward=fn reward.fn=json:dumps reward.timeout=0", "reward.timeout=0"),
    build_case("ppo", "reward=fn reward.fn=json:dumps", "reward.fn=json:dumps", "not a number for each"),
    build_case("ppo", "reward=check reward.check={kind:exakt}", "reward.check.kind=exakt", "exact"),
    build_case("ppo", "reward=check", "check=(missing)", "the row has no check"),
    build_case("eval", "artifact=ppo:nothing", "artifact=ppo:nothing", "python -m align stage=ppo"),
    build_case("eval", "artifact=reward:a", "artifact=reward:a"),
    build_case("eval", "stage.prompts=0", "stage.prompts=0"),
    build_case("eval", "reward.name=learned", "reward.name=learned", "reward=learned"),
    build_case("eval", "stage.seen=keep", "stage.seen=keep", "drop, report"),
    build_case("export", "artifact=sft:nothing", "artifact=sft:nothing"),
    build_case("export", "export=onnx", "export=onnx", "adapter, all, check, gguf, merged"),
    build_case("export", "export.dtype=int4", "export.dtype=int4", "bfloat16"),
    build_case("export", "export.require=[tgi]", "export.require=", "tgi"),
    build_case("export", "export=gguf export.quantised=[q2_k]", "export.quantised=", "q2_k"),
    build_case("export", "export=check", "export.path"),
    build_case("export", "export=check export.path=nowhere", "export.path=nowhere"),
    build_case("import", "stage.action=imprt", "stage.action=imprt", "import"),
    build_case("import", "stage.path=nowhere.jsonl", "stage.path=nowhere.jsonl", "no such file"),
    build_case("import", "stage.path=null", "stage.path="),
    build_case("import", "stage.port=80", "stage.port=80", "1024 to 65535"),
    build_case("import", "stage.agreement=0.5", "stage.agreement=0.5"),
    build_case("import", "store.url=mongodb://h/x", "store.url="),
    build_case("import", "store.url=sqlite://", "store.url=sqlite://", "in memory"),
    build_case("import", "stage.action=configure stage.settings={answers:x}", "settings"),
    build_case("import", "stage.action=verify project=nothing", "project=nothing"),
    # --- Annotation
    build_case("import", "devices=2", "devices=2", "stage=annotate works in one process"),
    build_case("import", "stage.action=configure", "stage.action=configure", "names no change"),
    build_case("import", "stage.action=restore stage.path=nowhere", "stage.path=nowhere"),
    build_case("import", "stage.action=export project=q", "project=q"),
    build_case("import", "stage.action=configure stage.settings=3", "stage.settings=3", "is no mapping"),
    build_case("import", "stage.action=configure stage.settings={overlapp:2}", "there is no such setting"),
    build_case("import", "stage.action=configure stage.state=asleep", "state=asleep", "there is no such state"),
    build_case("import", "stage.action=configure stage.guidelines=.", "stage.guidelines=.", "is a folder, not a file"),
    build_case("import", "stage.action=erase", "erases an item, an annotator or a whole project"),
    build_case(
        "import", "stage.action=erase stage.item=i stage.annotator=a", "an item, an annotator or a whole project"
    ),
    build_case("import", "stage.action=erase stage.item=nope project=default", "item=nope", "has no such item"),
    build_case("import", "stage.action=erase stage.annotator=nobody project=default", "no such annotator"),
    build_case("import", "stage.action=verify stage.head=nowhere project=default", "stage.head=nowhere"),
    build_case(
        "import", "stage.action=serve stage.demo=true stage.host=0.0.0.0 stage.url=https://a.example", "stage.host"
    ),
    build_case("import", "stage.action=serve stage.demo=true stage.url=https://a.example", "stage.url"),
    build_case("import", "stage.action=serve stage.host=0.0.0.0", "stage.url"),
    build_case("import", "stage.action=serve stage.url=https://a.example/path", "stage.url"),
    build_case("import", "stage.action=serve stage.url=a.example", "stage.url"),
    build_case("import", "stage.action=invite stage.role=owner", "stage.role=owner"),
    # --- Data sets
    build_case("data", "stage.sources=null", "stage.sources=None"),
    build_case("data", "stage.sources=[{path:nowhere.jsonl}]", "nowhere.jsonl"),
    build_case("data", "stage.sources=[{pth:a}]", "pth=a", "Did you mean path?"),
    build_case("data", "stage.sources=[{path:{file},weight:-1}]", "weight=-1", "is no share"),
    build_case("data", "stage.sources=[{file},{path:{file},weight:1}]", "which leaves no share for"),
    build_case("data", "stage.mix.total=100000", "stage.mix.repeat="),
    build_case("data", "stage.duplicates.prefer=[other]", "prefer=other", "is no source"),
    build_case("data", "stage.clean=[unicod]", "unicod", "is no cleaning step"),
    build_case("data", "stage.clean=[{length:{leest:3}}]", "leest", "there is no such argument"),
    build_case("data", "stage.clean=[{length:{least:999}}]", "is empty after cleaning"),
    build_case(
        "data", "stage.clean=[unicode,{score:{by:loss}}]", "Write stage.score.by=loss or stage.score.by=reward."
    ),
    build_case("data", "stage.split.by=time", "stage.split.since=None"),
    build_case("data", "stage.split.by=time stage.split.since=yesterday", "yesterday"),
    build_case("data", "stage.split.by=column", "split", "a column that no row has"),
    build_case("data", "data=jsonl data.path={file}", "is given beside stage.sources"),
    build_case("data", "stage.sources=null data=annotations", "is no source of a data set"),
    build_case("data", "stage.workers=2", "stage.workers=2", "stage.engine=embedded has none"),
    build_case("data", "stage.engine=daft stage.ray=auto", "stage.ray=auto", "stage.engine=daft"),
    build_case("data", "stage.engine=spark", "stage.engine=spark", "embedded, daft, ray"),
    build_case("data", "stage.score.by=loss", "model=(not given)", "stage.score.by=loss"),
    build_case("data", "stage.score.by=los", "stage.score.by=los"),
    build_case("data", "stage.score.by=reward run.root={file}.runs", "reward.ref=reward:latest"),
    build_case("data", "stage.score.keep=[0.1,0.9]", "has no effect without stage.score.by"),
    build_case("data", "stage.score.by=reward stage.score.keep=[0.9,0.1]", "are no two quantiles"),
    build_case("data", "stage.score.by=reward stage.score.keep=[0.9]", "are no two quantiles"),
    build_case(
        "data", "stage.score.by=reward stage.score.least=2 stage.score.most=1", "is more than stage.score.most=1"
    ),
    build_case("data", "reward=sentiment", "reward=sentiment", "without stage.score.by=reward"),
    build_case("data", "reward.ref=reward:best", "reward=learned", "without stage.score.by=reward"),
    build_case("sft", "data=manifest data.path=data:latest", "no finished data run"),
    build_case("sft", "data=manifest data.path=nowhere", "data.path=nowhere"),
    # --- Training
    build_case("sft", "device=cpu:7", "device=cpu:7"),
    build_case("sft", "run.name=a\x1bb", "run.name="),
    build_case("sft", "stage.optimiser=adamw_8bit", "stage.optimiser=adamw_8bit", "keeps its moments in 8 bits"),
    build_case("sft", "stage.eval_every=2 data.held_out=0", "stage.eval_every=2", "Raise data.held_out"),
    build_case("ppo", "stage.advantage=grpo stage.group_size=1", "stage.group_size=1"),
    build_case("ppo", "stage.advantage=rloo stage.group_size=3", "stage.batch_size=8"),
    build_case("ppo", "stage.advantage=rloo stage.group_size=2 stage.lam=0.9", "stage.lam=0.9"),
    build_case("ppo", "stage.advantage=rloo stage.group_size=2 stage.gamma=0.9", "stage.gamma=0.9"),
    build_case("ppo", "stage.scale_rewards=none", "stage.scale_rewards=none"),
    build_case("ppo", "stage.advantage=grpo stage.group_size=2 stage.kl_in=reward", "stage.kl_in=reward"),
    build_case("ppo", "stage.max_draws=2", "stage.max_draws=2"),
    build_case("ppo", "stage.importance_sampling_level=sequence", "stage.importance_sampling_level=sequence"),
    build_case("ppo", "stage.advantage=grpo stage.group_size=2 stage.kl_estimator=k1", "stage.kl_estimator=k1"),
    # --- Best of n
    build_case("sample", "stage.best_of=1", "stage.best_of=1", "from 2 to 4096"),
    build_case("sample", "stage.best_of=4 stage.candidates=3", "stage.candidates=3", "for people", "Drop it"),
    build_case("sample", "stage.gold={name:sentiment}", "stage.gold", "Add stage.best_of=N"),
    build_case("sample", "stage.best_of=4 stage.gold=vader", "stage.gold=vader", "is no mapping"),
    build_case("sample", "stage.best_of=4 stage.gold={name:magic}", "stage.gold.name=magic"),
    build_case(
        "sample", "stage.best_of=4 reward=sentiment stage.gold={name:sentiment}", "stage.gold=vader", "also ranks"
    ),
    build_case(
        "sample", "stage.best_of=4 reward.ref=reward:none", "reward.ref=reward:none", "python -m align stage=reward"
    ),
    build_case("sample", "stage.best_of=4 reward.ref=sft:s", "reward.ref=sft:s", "is no reward model"),
    build_case("sample", "stage.best_of=4 reward=sentiment stage.gold={name:check}", "check=(missing)"),
    # --- Evaluations of several systems
    build_case("suite", "stage.systems={}", "are not one to"),
    build_case("suite", "stage.systems=sft:s", "stage.systems=sft:s", "is no mapping"),
    build_case("suite", "stage.systems={a:sft:s,b:sft:s}", "is the same as a"),
    build_case("suite", "stage.systems={a:sft:s,b:nobody:x}", "stage.systems.b"),
    build_case("suite", "stage.systems={a:sft:s,b:sft:nobody}", "stage.systems.b"),
    build_case("suite", "stage.systems={a:sft:s,b:reward:a}", "is a reward model"),
    build_case("suite", "stage.systems={a:sft:s,_b:base}", "cannot be a name"),
    build_case("suite", "stage.systems={a:sft:s,b:{file:nothing.jsonl}}", "stage.systems.b.file"),
    build_case("suite", "stage.systems={a:sft:s,b:{folder:x}}", "names no system"),
    build_case("suite", "stage.first=c", "stage.first=c"),
    build_case("suite", "eval.tasks=[]", "is no list of tasks"),
    build_case("suite", "eval.tasks=[{path:x.jsonl}]", "eval.tasks[0].name"),
    build_case("suite", "eval.tasks=[{name:x,prompt:3}]", "is not a key here"),
    build_case("suite", "eval.tasks=[{name:x,prompts:0}]", "eval.tasks[0].prompts"),
    build_case("suite", "eval.tasks=[{name:x},{name:x}]", "is given twice"),
    build_case("suite", "eval.tasks=[{name:x,check:{kind:magic}}]", "eval.tasks[0].check"),
    build_case("suite", "eval.tasks=[{name:x,path:nothing.jsonl}]", "eval.tasks, x"),
    build_case("suite", "artifact=sft:s", "artifact=sft:s"),
    build_case("suite", "init=base", "init=base"),
    build_case("suite", "stage.seen=report", "stage.seen=report"),
    build_case("eval", "stage.answers=2", "stage.answers=2"),
    build_case("eval", "eval.gates=[{name:g,task:t,is:superior}]", "eval.gates"),
    build_case("eval", "eval.tasks=[{name:t,path:nothing.jsonl}]", "eval.tasks"),
    # --- Cards of judges
    *(
        build_case("judge", word, word.partition("=")[0])
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
    build_case("judge", "data=chitchat data.path=null", "holds no preference pairs"),
    build_case(
        "judge",
        "stage.judge=people data=annotations data.path=null",
        "are the reference that a judge is measured against",
    ),
    build_case(
        "export", "export.require=[llama.cpp]", "export.require=llama.cpp", "export=adapter does not check with it"
    ),
    build_case("export", "export.into=nf4", "export.into=nf4"),
    # --- Plans
    build_case("none", "stage=plan stage.of=pppo", "stage.of=pppo", "Did you mean stage.of=ppo?"),
    build_case("none", "stage=plan stage.of=serve", "stage.of=serve", "is no stage that is planned"),
    build_case("none", "stage=plan stage.card=0", "stage.card=0.0"),
    build_case("none", "stage=plan stage.card=inf", "stage.card=inf"),
    build_case("none", "stage=plan stage.throughput=1e-300", "stage.throughput=1e-300"),
    build_case("none", "stage=plan stage.throughput=nan", "stage.throughput=nan"),
    build_case("none", "stage=plan stage.answers=1", "stage.answers=1"),
    # --- Files of a model
    *(
        build_file_case("sft", content, *parts, of_model=name)
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
