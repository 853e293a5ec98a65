"""Templates of dataset lists for the scheduler."""

LIST = """\
submit: {{address: "{address}", python: "{python}"}}
defaults:
  cron: "0 * * * *"
  model: {{path: fashion-mnist}}
datasets:
"""
DATASET = '  {name}: {{input: {{uri: "{folder}/in"}}, output: {{uri: "{folder}/{name}"}}}}\n'
