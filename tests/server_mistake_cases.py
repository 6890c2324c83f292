"""Mistakes in commands about model servers and their tenants, one case a line, in the form of `mistake_cases`."""

from __future__ import annotations

from mistake_cases import build_case

CASES = [
    build_case("serve", "stage.host=0.0.0.0", "stage.host=0.0.0.0", "stage.keys"),
    build_case("serve", "stage.keys=nowhere.json stage.host=0.0.0.0", "stage.url=", "its address is not set"),
    build_case("serve", "stage.keys=nowhere.json", "stage.keys=nowhere.json", "stage.action=key"),
    build_case("serve", "stage.tenant=acme", "stage.tenant=acme", "stage.action=key"),
    build_case("key", "stage.action=tenants", "stage.keys=", "there is no such key file"),
    build_case("key", "stage.action=tenants stage.concurrency=2", "stage.concurrency=2", "stage.action=key"),
    build_case("serve", "stage.lift=[speed]", "stage.lift=speed", "concurrency"),
    build_case("serve", "stage.adapters=ppo:latest", "stage.adapters=ppo:latest", "{NAME: REF}"),
    build_case("serve", "stage.adapters={a:sft:nothing}", "stage.adapters.a=sft:nothing"),
    build_case("serve", "stage.adapters={a:sft:s} model=pocket", "stage.adapters.a=sft:s", "another base"),
    build_case("serve", "serve=sglang", "serve=sglang", "align, vllm"),
    build_case("serve", "serve.args={quantization:fp8}", "serve.args=", "serve=vllm"),
    build_case("serve", "serve=vllm serve.args={port:1}", "serve.args.port=1", "stage.port"),
    build_case("serve", "serve=vllm serve.args=[eager]", "serve.args=", "enforce-eager: true"),
    build_case("serve", "serve=vllm serve.dtype=int8", "serve.dtype=int8", "bfloat16"),
    build_case("serve", "serve=vllm serve.python=nowhere/python", "serve.python=nowhere/python", "bin/python"),
    build_case("serve", "serve=vllm", "serve.python=auto", "VENV/bin/python"),
    build_case("serve", "stage.adapters={a:sft:s} method=lora", "stage.adapters.a=sft:s", "method=qlora"),
    build_case("key", "stage.tenant=null", "stage.tenant=", "stage.tenant=NAME"),
    build_case("key", "stage.tenant=a/b", "stage.tenant=a/b"),
    build_case("key", "run.root=r stage.keys=r/keys.json", "stage.keys=r/keys.json", "run.root"),
    build_case("key", "stage.keys={file}", "stage.keys=", "chmod 600"),
    build_case("key", "stage.revoke=all", "stage.tenant=acme", "no such tenant"),
    build_case("key", "stage.allow=support", "stage.allow=support", "[support, legal]"),
    build_case("key", "stage.concurrency=1 stage.lift=[concurrency]", "stage.lift=", "set and taken away"),
]
