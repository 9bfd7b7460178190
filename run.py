"""The command line in a checkout: `python run.py method=awq bits=4` is `gptq-awq method=awq bits=4`."""

from gptq_awq.__main__ import main

if __name__ == "__main__":
    main()
