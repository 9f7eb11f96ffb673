"""``python -m lm_eval_adainfer ...`` does what ``lm_eval ...`` does, without relying on the ``.pth`` file."""

from lm_eval_adainfer.registration import install

if __name__ == "__main__":
    install()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
