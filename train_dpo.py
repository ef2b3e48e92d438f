"""Tune a chat model towards preferred answers, with direct preference optimization or another loss of its family.

python train_dpo.py                                                 starts from out/full_sft_512
torchrun --nproc_per_node 2 train_dpo.py --n_layers 16 --dim 768 --batch_size 4 --use_wandb
"""

from training import DPOConfig, run_stage


def main(asked: DPOConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import build_engine, train
    from training.objectives import preference
    from training.reference import prepare_reference
    from training.setup import load_data, run_identity, start_machine, starting_model

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model: those of the fine-tuned folder
    start = starting_model(asked)

    # 3. Data: pairs with one shared prompt, packed whole; for --loss_type kto also single answers with a label
    data = load_data(start, machine)

    # 4. What is optimised: the margin between the answers, in most losses measured from where the model starts
    objective = preference(asked)

    # 5. How it is spread
    identity = run_identity(start, data)
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. The reference: the starting model's own log-probabilities of the pairs this run comes to, cached; where the
    # loss has one
    for loader in data.parts:
        prepare_reference(loader, objective, engine, start.config, identity["init_from"])

    # 7. Train, and leave a Hugging Face model folder
    train(engine, objective, data.train, data.val, start, identity)


if __name__ == "__main__":
    run_stage(main, DPOConfig)
