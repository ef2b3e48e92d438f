"""Train a reward model on pairs of answers: one score for an answer, higher for the one that is preferred.

python train_reward.py                                              starts from out/full_sft_512
torchrun --nproc_per_node 2 train_reward.py --data_path pairs.jsonl --n_layers 16 --dim 768 --batch_size 4
"""

from training import RewardConfig, run_stage


def main(asked: RewardConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import BradleyTerry, build_engine, train
    from training.setup import load_data, run_identity, start_machine, starting_model

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model: those of the fine-tuned folder, with a head that scores in place of the vocabulary's
    start = starting_model(asked)

    # 3. Data: pairs with one shared prompt, packed whole
    data = load_data(start, machine)

    # 4. What is optimised: that the chosen answer's score is above the rejected one's
    objective = BradleyTerry(asked.center_weight)

    # 5. How it is spread
    identity = run_identity(start, data)
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. Train, and leave a Hugging Face folder that scores
    train(engine, objective, data.train, data.val, start, identity)


if __name__ == "__main__":
    run_stage(main, RewardConfig)
