#!/usr/bin/env bash
# The whole job on bundled data: train ACNet on handwritten digits with 2 ranks, evaluate, fuse,
# evaluate again, plot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 0 ] || { echo "error: quickstart.sh takes no arguments" >&2; exit 2; }
bash scripts/setup.sh
source .venv/bin/activate

started=$SECONDS
output=outputs/quickstart
rm -rf "$output"
mkdir -p "$output"
echo "== training cifar_quick with asymmetric convolution blocks on digits, 2 ranks"
mpirun -n 2 python3 train.py --config_path=configs/digits.yaml --run_distribute=1 --output_path="$output"
run=$(ls -d "$output"/*/)
checkpoint=$(readlink -f "$run"latest.ckpt)
echo "== evaluating the trained network"
mpirun -n 2 python3 eval.py --checkpoint_file_path="$checkpoint" --result_path="$run"eval.json
echo "== fusing each block into one convolution"
python3 export.py --checkpoint_file_path="$checkpoint" --file_format=CKPT --result_path="$run"fused.ckpt | tee "$run"export.txt
echo "== evaluating the fused network"
mpirun -n 2 python3 eval.py --checkpoint_file_path="$run"fused.ckpt --result_path="$run"eval_fused.json
echo "next: source .venv/bin/activate; python3 train.py --data_path=FOLDER, with a folder of images per class"
echo "curves: ${run}curves.png"
python3 - "$run" $((SECONDS - started)) <<'PYTHON'
import json, re, sys
run, seconds = sys.argv[1], sys.argv[2]
trained, fused = (json.load(open(run + name))[0] for name in ("eval.json", "eval_fused.json"))
difference = re.search(r"difference (\S+)", open(run + "export.txt").read()).group(1)
print(f"quickstart: top1={trained['top1']:.2f} top5={trained['top5']:.2f} fused_top1={fused['top1']:.2f} "
      f"fused_max_diff={difference} seconds={seconds}")
PYTHON
