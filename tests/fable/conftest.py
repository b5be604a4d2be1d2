"""What the tests of fable share: its conversations and its vocabulary, made once."""

import pytest

from refollama.fable.lessons import conversation


@pytest.fixture(scope="session")
def talks():
    """Conversations that training shows."""
    return [conversation(0, index) for index in range(550)]


@pytest.fixture(scope="session")
def held():
    """Conversations of combinations that it never shows."""
    return [conversation(1, index, held=True) for index in range(250)]


@pytest.fixture(scope="session")
def vocabulary():
    """The metadata of a vocabulary as training learns it, of fewer conversations."""
    from refollama.fable.vocabulary import learn

    return learn(0, sample=2000)


@pytest.fixture(scope="session")
def words(vocabulary):
    """The tokenizer over it."""
    from refollama.text.spm import SpmTokenizer
    from refollama.weights.gguf import Typed

    plain = {k: v.value if isinstance(v, Typed) else v for k, v in vocabulary.items()}
    return SpmTokenizer.from_metadata(plain)


@pytest.fixture(scope="session")
def asked():
    """Three questions of each lesson, as evaluation asks them."""
    from refollama.fable.evaluate import cases

    return cases(each=3)
