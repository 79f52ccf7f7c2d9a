"""`python -m visattn`, and so `torchrun ... -m visattn`: the command line."""

from visattn.cli import main

if __name__ == "__main__":
    main()
