"""BibTeX of what a method uses. The keys are those that each recipe names."""

from __future__ import annotations

from forwardgrad import recipes

ENTRIES = {
    "bacho2023": """@article{bacho2023,
  author = {Bacho, Florian and Chu, Dominique},
  title = {Low-Variance Forward Gradients using Direct Feedback Alignment and Momentum},
  journal = {Neural Networks},
  volume = {169},
  pages = {572--583},
  year = {2024},
  eprint = {2212.07282},
  archiveprefix = {arXiv},
}""",
    "baydin2022": """@article{baydin2022,
  author = {Baydin, At{\\i}l{\\i}m G{\\"u}ne{\\c{s}} and Pearlmutter, Barak A. and Syme, Don and Wood, Frank and Torr, Philip},
  title = {Gradients without Backpropagation},
  journal = {arXiv preprint arXiv:2202.08587},
  year = {2022},
  eprint = {2202.08587},
  archiveprefix = {arXiv},
}""",
    "belilovsky2019": """@inproceedings{belilovsky2019,
  author = {Belilovsky, Eugene and Eickenberg, Michael and Oyallon, Edouard},
  title = {Greedy Layerwise Learning Can Scale to {ImageNet}},
  booktitle = {Proceedings of the 36th International Conference on Machine Learning},
  series = {Proceedings of Machine Learning Research},
  volume = {97},
  pages = {583--593},
  publisher = {PMLR},
  year = {2019},
}""",
    "chen2016": """@article{chen2016,
  author = {Chen, Tianqi and Xu, Bing and Zhang, Chiyuan and Guestrin, Carlos},
  title = {Training Deep Nets with Sublinear Memory Cost},
  journal = {arXiv preprint arXiv:1604.06174},
  year = {2016},
  eprint = {1604.06174},
  archiveprefix = {arXiv},
}""",
    "fournier2023": """@inproceedings{fournier2023,
  author = {Fournier, Louis and Rivaud, St{\\'e}phane and Belilovsky, Eugene and Eickenberg, Michael and Oyallon, Edouard},
  title = {Can Forward Gradient Match Backpropagation?},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  series = {Proceedings of Machine Learning Research},
  volume = {202},
  pages = {10249--10264},
  publisher = {PMLR},
  year = {2023},
}""",
    "jabri1992": """@article{jabri1992,
  author = {Jabri, Marwan and Flower, Barry},
  title = {Weight Perturbation: An Optimal Architecture and Learning Technique for Analog {VLSI} Feedforward and Recurrent Multilayer Networks},
  journal = {IEEE Transactions on Neural Networks},
  volume = {3},
  number = {1},
  pages = {154--157},
  year = {1992},
}""",
    "lecun1988": """@inproceedings{lecun1988,
  author = {Le Cun, Yann and Galland, Conrad C. and Hinton, Geoffrey E.},
  title = {{GEMINI}: Gradient Estimation Through Matrix Inversion After Noise Injection},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {1},
  pages = {141--148},
  publisher = {Morgan Kaufmann},
  year = {1988},
}""",
    "nokland2016": """@inproceedings{nokland2016,
  author = {N{\\o}kland, Arild},
  title = {Direct Feedback Alignment Provides Learning in Deep Neural Networks},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {29},
  pages = {1037--1045},
  year = {2016},
}""",
    "ren2023": """@inproceedings{ren2023,
  author = {Ren, Mengye and Kornblith, Simon and Liao, Renjie and Hinton, Geoffrey},
  title = {Scaling Forward Gradient With Local Losses},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2210.03310},
  archiveprefix = {arXiv},
}""",
    "rumelhart1986": """@article{rumelhart1986,
  author = {Rumelhart, David E. and Hinton, Geoffrey E. and Williams, Ronald J.},
  title = {Learning Representations by Back-Propagating Errors},
  journal = {Nature},
  volume = {323},
  number = {6088},
  pages = {533--536},
  year = {1986},
}""",
    "widrow1990": """@article{widrow1990,
  author = {Widrow, Bernard and Lehr, Michael A.},
  title = {30 Years of Adaptive Neural Networks: Perceptron, Madaline, and Backpropagation},
  journal = {Proceedings of the IEEE},
  volume = {78},
  number = {9},
  pages = {1415--1442},
  year = {1990},
}""",
}
"""`{key: BibTeX entry}`, sorted by key."""


def bibtex(method: str) -> str:
    """The BibTeX entries of the papers behind a method.

    Args:
      method: its name on the command line.

    Returns:
      The entries, a blank line between them.

    Raises:
      InputError: there is no such method; the nearest names are given.

    Example:
      >>> from forwardgrad.cite import bibtex
      >>> print(bibtex("fg-w").splitlines()[0])
      @article{baydin2022,
    """
    return "\n\n".join(ENTRIES[key] for key in recipes.find(method).cite)
