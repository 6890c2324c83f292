# What the scripts of this recipe share: root and seeds from the command line, the dtype, and the systems that an evaluation asks.
root=${1:-runs/instructions}
seeds=("${@:2}")
seeds=("${seeds[@]:-0}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
systems=""
for seed in "${seeds[@]}"; do systems+="practised-$seed: ppo:practised-$seed, imitated-$seed: sft:imitated-$seed, "; done
systems+="base: base"
evaluation="stage=eval model=smollm2 'stage.systems={$systems}' 'run.root=$root' dtype=$dtype rollout.temperature=0 rollout.batch_size=32"
all_seeds=$(IFS=-; echo "${seeds[*]}")
