"""`python -m harvest`, which launchers such as torchrun need."""

from matryoshka.launch import harvest

if __name__ == "__main__":
    harvest()
