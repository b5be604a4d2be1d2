"""What the tests of fable share: its conversations and its vocabulary, made once."""

import pytest

from refollama.fable.lessons import conversation


@pytest.fixture(scope="session")
def talks():
    """Conversations that training shows."""
    return [conversation(0, index) for index in range(800)]


@pytest.fixture(scope="session")
def held():
    """Conversations of combinations that it never shows."""
    return [conversation(1, index, held=True) for index in range(400)]


@pytest.fixture(scope="session")
def vocabulary():
    """The metadata of the vocabulary that training learns."""
    from refollama.fable.vocabulary import learn

    return learn(0)


@pytest.fixture(scope="session")
def words(vocabulary):
    """The tokenizer over it."""
    from refollama.text.spm import SpmTokenizer
    from refollama.weights.gguf import Typed

    plain = {k: v.value if isinstance(v, Typed) else v for k, v in vocabulary.items()}
    return SpmTokenizer.from_metadata(plain)
