#!/bin/sh
# nvidia-cuda-runtime 13.0.96: it has cuda.h, cuda_runtime.h and cuda_fp16.h, and comes with torch, but a C++ compiler
# can read cuda.h alone. The others include crt/host_config.h and nv/target, which are in nvidia-cuda-crt and
# nvidia-cuda-cccl; the package requires neither. So torch's AOTInductor finds its headers there and fails to compile.
#
# Seen, with the first package alone and with all three:
#   alone/cuda.h compiles
#   alone/cuda_runtime.h does not
#   alone/cuda_fp16.h does not
#   all/cuda.h compiles
#   all/cuda_runtime.h compiles
#   all/cuda_fp16.h compiles
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m pip install -q --no-deps --no-compile --target alone nvidia-cuda-runtime==13.0.96
python3 -m pip install -q --no-deps --no-compile --target all nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-cccl==13.0.85
seen=""
for packages in alone all; do
    for header in cuda.h cuda_runtime.h cuda_fp16.h; do
        printf '#include <%s>\n' "$header" > include.cpp
        if g++ -fsyntax-only -I "$packages/nvidia/cu13/include" include.cpp 2> errors.txt; then
            seen="$seen$packages/$header compiles
"
        else
            seen="$seen$packages/$header does not
"
        fi
    done
done
printf '%s' "$seen"
[ "$seen" = "alone/cuda.h compiles
alone/cuda_runtime.h does not
alone/cuda_fp16.h does not
all/cuda.h compiles
all/cuda_runtime.h compiles
all/cuda_fp16.h compiles
" ]
