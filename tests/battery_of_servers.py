"""Cases of the battery about a server of models and about its tenants. See `battery`."""

from __future__ import annotations

from battery import line

CASES = [
    line("serve", "stage.host=0.0.0.0", "stage.host=0.0.0.0", "stage.keys"),
    line("serve", "stage.keys=nowhere.json stage.host=0.0.0.0", "stage.url=", "its address is not set"),
    line("serve", "stage.keys=nowhere.json", "stage.keys=nowhere.json", "stage.action=key"),
    line("serve", "stage.tenant=acme", "stage.tenant=acme", "stage.action=key"),
    line("key", "stage.action=tenants", "stage.keys=", "there is no such key file"),
    line("key", "stage.action=tenants stage.concurrency=2", "stage.concurrency=2", "stage.action=key"),
    line("serve", "stage.lift=[speed]", "stage.lift=speed", "concurrency"),
    line("serve", "stage.adapters=ppo:latest", "stage.adapters=ppo:latest", "{NAME: REF}"),
    line("serve", "stage.adapters={a:sft:nothing}", "stage.adapters.a=sft:nothing"),
    line("serve", "stage.adapters={a:sft:s} model=pocket", "stage.adapters.a=sft:s", "another base"),
    line("serve", "serve=sglang", "serve=sglang", "align, vllm"),
    line("serve", "serve.args={quantization:fp8}", "serve.args=", "serve=vllm"),
    line("serve", "serve=vllm serve.args={port:1}", "serve.args.port=1", "stage.port"),
    line("serve", "serve=vllm serve.args=[eager]", "serve.args=", "enforce-eager: true"),
    line("serve", "serve=vllm serve.dtype=int8", "serve.dtype=int8", "bfloat16"),
    line("serve", "serve=vllm serve.python=nowhere/python", "serve.python=nowhere/python", "bin/python"),
    line("serve", "serve=vllm", "serve.python=auto", "VENV/bin/python"),
    line("serve", "stage.adapters={a:sft:s} method=lora", "stage.adapters.a=sft:s", "method=qlora"),
    line("key", "stage.tenant=null", "stage.tenant=", "stage.tenant=NAME"),
    line("key", "stage.tenant=a/b", "stage.tenant=a/b"),
    line("key", "run.root=r stage.keys=r/keys.json", "stage.keys=r/keys.json", "run.root"),
    line("key", "stage.keys={file}", "stage.keys=", "chmod 600"),
    line("key", "stage.revoke=all", "stage.tenant=acme", "no such tenant"),
    line("key", "stage.allow=support", "stage.allow=support", "[support, legal]"),
    line("key", "stage.concurrency=1 stage.lift=[concurrency]", "stage.lift=", "set and taken away"),
]
