"""`python -m evaluate`, which launchers such as torchrun need."""

from matryoshka.launch import evaluate

if __name__ == "__main__":
    evaluate()
