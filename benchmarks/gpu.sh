#!/usr/bin/env bash
# The programme for a machine with a GPU: the demo, the real job, the benchmarks, the tests.
#
#   bash benchmarks/gpu.sh                  at most 9 minutes; exit code 75: call again, it goes on
#   until bash benchmarks/gpu.sh; do [ $? = 75 ] || break; done          all of it
#   bash benchmarks/gpu.sh train after      these pieces alone
#   SMALL=1 DEVICE=cpu MODEL=FOLDER DATASET=FOLDER bash benchmarks/gpu.sh      a rehearsal
#
# What is done is noted in $WORK and not done twice. A piece that was killed is begun again, and
# goes on where it can. Each piece copies what it has into $RESULTS/gpu-*, also when it has failed
# or its time was up; $RESULTS/gpu-pieces.md says what happened. Settings: environment variables.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} # a folder, or a hub name
DATASET=${DATASET:-openai/gsm8k}           # a folder with train.jsonl and test.jsonl, or a hub name
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python}
WORK=${WORK:-runs/gpu}
RESULTS=${RESULTS:-results}
SECONDS_A_CALL=${SECONDS_A_CALL:-530}
TRAIN_CALLS=${TRAIN_CALLS:-2} # that may train; then the newest checkpoint is evaluated
URL=${URL:-}                  # of a vLLM server (docs/served.md)
COMMIT=${COMMIT:-}            # of this source, where there is no git to ask
ALL="environment demo before train after rollout step roofline memory cuda tests"
LEAST=60                      # seconds that a short piece needs
if [ -n "${SMALL:-}" ]; then  # the same pieces, as small as they can be
    LEAST=5
    SIZES="--rollouts_per_step 2 --group_size 4 --train_batch_size 8 --micro_batch_size 4"
    PROMPT=${PROMPT:-448}
    SIZES="$SIZES --max_new_tokens ${TOKENS:-24} --max_prompt_tokens $PROMPT"
    QUESTIONS=${QUESTIONS:-6}
    # A reward that differs from completion to completion, or nothing would be trained.
    REWARD="--reward repetition length_penalty --reward_weights 1 1"
    TRAIN=${TRAIN:-"--steps 3 $SIZES $REWARD --eval_interval 2 --eval_questions 4
        --checkpoint_interval 1"}
    DEMO=${DEMO:-"$SIZES --steps 2 --eval_questions 20"}
    ROLLOUT=${ROLLOUT:-"--batches 4 8 --group_size 4 --repeats 1 --max_new_tokens ${TOKENS:-24}"}
    STEP=${STEP:-"--steps 1 --warmup 1 --trl_batch_size 4 --all='$SIZES'"}
    ROOFLINE=${ROOFLINE:-"--questions 2 --group_size 4 --completion_tokens 8 --steps 1"}
    MEMORY=${MEMORY:-"$SIZES"}
    TESTS=${TESTS:-tests/test_speedrun.py}
fi
PROMPT=${PROMPT:-512}     # the longest prompt, in tokens
QUESTIONS=${QUESTIONS:-0} # of the test set, before and after; 0: all
TRAIN=${TRAIN:-"--eval_interval 20 --eval_questions 256
    --checkpoint_interval 10 --keep_checkpoints 1"}
DEMO=${DEMO:-}
ROLLOUT=${ROLLOUT:-"--batches 16 32 64 128 256 512 --max_new_tokens 256"}
STEP=${STEP:-"--steps 3 --warmup 1
    --all='--rollouts_per_step 8 --train_batch_size 96 --max_new_tokens 256'"}
ROOFLINE=${ROOFLINE:-"--questions 32 --group_size 12 --prompt_tokens 256 --completion_tokens 256
    --micro_batch_size 16 --steps 2"}
MEMORY=${MEMORY:-}
TESTS=${TESTS:-tests}

left() { echo $((SECONDS_A_CALL - SECONDS)); }
has() { "$PYTHON" -c "import $1" 2> /dev/null; }
done_with() { touch "$WORK/$1.done"; }

# log PIECE OUTCOME SECONDS WORDS: a row of the table of what happened.
log() {
    printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "${4//|/}" | tee -a "$RESULTS/gpu-pieces.md"
}

skip() {
    log "$1" skipped "" "$2"
    done_with "$1"
}

# Copy what a piece has written so far; of the real job a report, of the tests the end of the log.
collect() {
    local file run="$WORK/runs/seed-42/metrics.jsonl"
    for file in "$WORK/$1"/*.md "$WORK/$1"/*.jsonl; do
        [ -s "$file" ] && cp "$file" "$RESULTS/gpu-$1.${file##*.}"
    done
    case $1 in
    before | train | after)
        "$PYTHON" benchmarks/gpu_report.py train --out "$WORK/real" --work "$WORK/runs" \
            --dataset "$DATASET" > "$WORK/report" && cp "$WORK/report" "$RESULTS/gpu-train.md"
        [ -s "$run" ] && cp "$run" "$RESULTS/gpu-train.jsonl" ;;
    environment | cuda | tests) tail -n 15 "$WORK/$1/log" > "$RESULTS/gpu-$1.md" ;;
    esac
}

# piece NAME SECONDS COMMAND...: run it in the time that is left, if that is at least so much.
piece() {
    local name=$1 least=$2 begun=$SECONDS code last tries
    shift 2
    if [ "$(left)" -lt "$least" ]; then
        echo "$name needs $least seconds, and $(left) are left: call again to go on"
        exit 75
    fi
    mkdir -p "$WORK/$name"
    echo "== $name: $*"
    echo "$name" > "$WORK/running"
    timeout --signal=INT --kill-after=20 "$(left)" "$@" < /dev/null 2>&1 | tee "$WORK/$name/log"
    code=${PIPESTATUS[0]}
    rm -f "$WORK/running"
    last=$(grep '^error:' "$WORK/$name/log" || grep -v '^ *$' "$WORK/$name/log" | tail -n 1)
    last=$(head -n 1 <<< "$last" | cut -c1-200)
    collect "$name"
    local outcome="failed, exit code $code" late=""
    case $code in
    0) outcome="done" ;;
    75 | 124 | 130 | 137) outcome="its time was up" late=1 ;;
    esac
    log "$name" "$outcome" $((SECONDS - begun)) "$last"
    [ "$code" != 0 ] || { done_with "$name"; return; }
    echo x >> "$WORK/$name.tries"
    tries=$(wc -l < "$WORK/$name.tries")
    if [ "$name$code" = train75 ] && [ "$tries" -ge "$TRAIN_CALLS" ]; then # as many steps as fit
        done_with train
        return
    elif [ "$name$code" != train75 ] && [ "$tries" -ge 3 ]; then
        skip "$name" "given up after $tries times"
        return
    fi
    [ -z "$late" ] || { echo "call again to go on"; exit 75; }
    again=1 # the others first
}

# speedrun NAME SECONDS STAGE: a stage of the real job; each is resumable by itself.
speedrun() {
    piece "$1" "$2" "$PYTHON" benchmarks/speedrun.py gsm8k-50 --seeds 42 --stages "$3" \
        --out "$WORK/real" --work "$WORK/runs" --model "$MODEL" --dataset "$DATASET" \
        --questions "$QUESTIONS" --seconds $(($(left) - 10)) ${COMMIT:+--commit "$COMMIT"} \
        -- --device "$DEVICE" $TRAIN
}

# bench SECONDS FILE ARGUMENTS...: one of the benchmarks here.
bench() {
    local least=$1 file=$2
    shift 2
    piece "$name" "$least" "$PYTHON" "benchmarks/$file" "$@"
}

run() {
    local name=$1 out="$WORK/$1" options=""
    local data=(--model "$MODEL" --dataset "$DATASET")
    case $name in
    environment) bench 10 gpu_report.py environment --device "$DEVICE" ;;
    demo) bench $LEAST demo.py --seeds 42 --out "$out" -- "--device=$DEVICE" $DEMO ;;
    before) speedrun "$name" $LEAST baseline ;;
    train) speedrun "$name" $((LEAST * 3)) train ;;
    after)
        [ -e "$WORK/train.done" ] || { echo "after: once train is done"; again=1; return; }
        speedrun "$name" $((LEAST * 2)) evaluate ;;
    rollout)
        bench $LEAST rollout_speed.py "${data[@]}" --device "$DEVICE" --out "$out" $ROLLOUT \
            ${URL:+--url "$URL"} -- --preset gsm8k --max_prompt_tokens "$PROMPT" --kl_weight 0 ;;
    step)
        eval "set -- $STEP"
        local workload=gpu
        [ "$DEVICE" = cuda ] || workload=smollm2
        bench $((LEAST * 2)) step.py --workload $workload "${data[@]}" --out "$out" "$@" ;;
    roofline)
        bench $((LEAST * 2)) roofline.py --model "$MODEL" --device "$DEVICE" --out "$out" \
            $ROOFLINE -- --precision bf16 --gradient_checkpointing true ;;
    memory)
        bench $LEAST memory_plan.py --check "$MODEL" --device "$DEVICE" --out "$out/memory.jsonl" \
            -- --dataset "$DATASET" $MEMORY ;;
    cuda | tests)
        has pytest || { skip "$name" "pytest is not installed"; return; }
        has xdist || options="-o addopts="
        has hypothesis || options="$options --ignore tests/test_laws.py"
        local which=$TESTS
        [ "$name" = tests ] || which="tests/test_second_device.py -k real_gpu"
        [ "$name$DEVICE" != cudacpu ] || { skip cuda "DEVICE is cpu"; return; }
        piece "$name" $((LEAST * 2)) "$PYTHON" -m pytest -q -p no:cacheprovider $options $which ;;
    esac
}

for each in "$@"; do
    if [[ " $ALL " != *" $each "* ]]; then
        echo "error: There is no piece '$each'; choose among: $ALL." >&2
        exit 2
    fi
done
if [ ! -d "$DATASET" ] && ! has datasets; then
    echo "error: DATASET=$DATASET is no folder here, and the package datasets is not installed;" \
        "give DATASET a folder with train.jsonl and test.jsonl." >&2
    exit 2
fi
mkdir -p "$WORK" "$RESULTS"
again=0
if [ ! -s "$RESULTS/gpu-pieces.md" ]; then
    log piece outcome seconds "its last line"
    log --- --- --- ---
fi
if [ -s "$WORK/running" ]; then
    log "$(cat "$WORK/running")" "was killed" "" "begun again"
    rm -f "$WORK/running"
fi
for each in ${*:-$ALL}; do
    [ -e "$WORK/$each.done" ] || run "$each"
done
[ $again = 0 ] || { echo "something is left: call again to go on"; exit 75; }
echo "everything is done: $RESULTS/gpu-*"
