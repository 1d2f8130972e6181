"""The tables and figures of four papers, each as one command on the models at hand.

    python -m benchmarks.papers.gptq --list
    python -m benchmarks.papers.gptq table3 --models models --data ../shared/data --out

GPTQ (Frantar et al. 2022), AWEQ (Li et al. 2023), SBC (Pandey et al. 2023, Softmax Bias Correction)
and IPQS (Ahmadian et al. 2023, Intriguing Properties of Quantization at Scale) are `gptq`, `aweq`,
`sbc` and `ipqs`. What a paper prints stands in columns of its own and is of another model.
`benchmarks.papers.page` writes docs/results.md from the results files.
"""
