"""From words to classes: which of CIFAR-10's classes a description such as "things with wings" means.

Two ways share one interface (`understood`): a sentence encoder with a head that was trained on hand-written
properties of the classes (`sentences`), and any causal language model, asked yes or no for each class
(`language_model`). `data/` holds the properties.
"""
