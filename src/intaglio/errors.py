"""Every exception that intaglio raises on purpose, in one tree.

    IntaglioError
    ├── InputError          wrong use or wrong input: exit code 2
    │   ├── ConfigError     a model folder, config or tokenizer that does not fit
    │   ├── RecipeError     a recipe that is malformed or does not fit the model
    │   ├── CorpusError     training or evaluation text that cannot be used
    │   └── OutputError     an output path that is taken, full or not writable
    ├── WeightError         NaN, Inf or a value that the grid cannot hold: exit code 2
    ├── TrainingError       a loss that became NaN or Inf: exit code 2
    ├── QualityError        a quality gate was missed: exit code 1
    ├── RuntimeFailureError a runtime that is not ours died, hung or was killed: exit code 1
    └── MismatchError       an artifact that does not hold the trained codes: exit code 3

A message says what is wrong, where, what was found and expected, and what to do about it.
The command line prints it without a traceback and exits with the class's `exit_code`.
"""


class IntaglioError(Exception):
    exit_code = 2


class InputError(IntaglioError):
    pass


class ConfigError(InputError):
    pass


class RecipeError(InputError):
    pass


class CorpusError(InputError):
    pass


class OutputError(InputError):
    pass


class WeightError(IntaglioError):
    pass


class TrainingError(IntaglioError):
    pass


class QualityError(IntaglioError):
    exit_code = 1


class RuntimeFailureError(IntaglioError):
    exit_code = 1


class MismatchError(IntaglioError):
    exit_code = 3
