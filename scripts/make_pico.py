"""Make pico from a seed alone: the small checkpoint and the small data set that ship with litlora.

The checkpoint knows a few skills with words and numbers as plain statements (`"robin" spelled backwards is "nibor".`)
and has never seen an instruction. The data set asks for the same skills in instructions. Validation asks about words
and sums that occur in neither training nor any statement. Every response can be verified.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

from litlora.data.dataset import write_dataset
from litlora.data.examples import Example, Turn
from litlora.data.prompts.styles import ALPACA, ALPACA_WITH_INPUT, TemplateStyle
from litlora.data.readers.row_store import to_line
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.utils.files import write_atomically

SEED = 2026
VAL_WORDS, VAL_SUMS, TRAIN_SUMS = 28, 24, 360
STATED_SUMS = 800  # which train asks about as well: many, so that sums are not memorized
LARGEST_TERM = 49  # so that every sum has at most two digits
SHARE_OF_SUMS = 0.3  # of the pre-training texts
BOS, EOS = "<s>", "</s>"
TOKENIZER_TEXTS = 3000
ROWS, ROW_LENGTH = 16, 128  # of a step of pre-training
STEPS, WARMUP_STEPS, PEAK_LEARNING_RATE = 2500, 100, 2e-3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == "assistant" %}Answer:
{{ message.content }}{{ eos_token }}
{% else %}{{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:
{% endif %}"""


def plural(word: str) -> str:
    """Form a regular plural as English spells it."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@dataclass(frozen=True)
class Skill:
    """A task with one correct response, and its wordings as statements and as instructions."""

    answer: Callable[[str], str]
    statements: tuple[str, ...]
    instructions: tuple[str, ...]
    """One without {subject} has the subject as its input."""


REVERSE = Skill(
    lambda word: word[::-1],
    statements=(
        '"{subject}" spelled backwards is "{answer}".',
        'The reverse of "{subject}" is "{answer}".',
        'Read from its end, "{subject}" becomes "{answer}".',
    ),
    instructions=(
        'Spell "{subject}" backwards.',
        'What is the reverse of "{subject}"?',
        "Spell the word backwards.",
    ),
)
SORT = Skill(
    lambda word: "".join(sorted(word)),
    statements=(
        'The letters of "{subject}" in alphabetical order are "{answer}".',
        'Sorting the letters of "{subject}" gives "{answer}".',
        '"{subject}" with its letters sorted is "{answer}".',
    ),
    instructions=(
        'Sort the letters of "{subject}".',
        'Put the letters of "{subject}" in alphabetical order.',
        "Sort the letters of the word.",
    ),
)
PLURAL = Skill(
    plural,
    statements=(
        'The plural of "{subject}" is "{answer}".',
        'One says "{subject}" for one and "{answer}" for many.',
        'More than one "{subject}" are "{answer}".',
    ),
    instructions=(
        'What is the plural of "{subject}"?',
        'Form the plural of "{subject}".',
        "Give the plural of the word.",
    ),
)
CAPITALS = Skill(
    str.upper,
    statements=(
        '"{subject}" in capital letters is "{answer}".',
        'Written in capitals, "{subject}" is "{answer}".',
        'The capital form of "{subject}" is "{answer}".',
    ),
    instructions=(
        'Write "{subject}" in capital letters.',
        'What is "{subject}" in capitals?',
        "Write the word in capital letters.",
    ),
)
LAST = Skill(
    lambda word: word[-1],
    statements=(
        'The last letter of "{subject}" is "{answer}".',
        '"{subject}" ends with the letter "{answer}".',
        'At the end of "{subject}" stands "{answer}".',
    ),
    instructions=(
        'What is the last letter of "{subject}"?',
        'With which letter does "{subject}" end?',
        "Name the last letter of the word.",
    ),
)
COUNT = Skill(
    lambda word: str(len(word)),
    statements=(
        'The number of letters in "{subject}" is "{answer}".',
        'Counting the letters of "{subject}" gives "{answer}".',
        'The length of "{subject}" is "{answer}".',
    ),
    instructions=(
        'How many letters does "{subject}" have?',
        'Count the letters of "{subject}".',
        "Count the letters of the word.",
    ),
)
SUM = Skill(
    lambda terms: str(sum(map(int, terms.split(" + ")))),
    statements=(
        'The sum of "{subject}" is "{answer}".',
        '"{subject}" equals "{answer}".',
        'Adding up "{subject}" gives "{answer}".',
    ),
    instructions=(
        'What is "{subject}"?',
        'Work out the sum of "{subject}".',
        "Add up the numbers.",
    ),
)
WORD_SKILLS = (REVERSE, SORT, PLURAL, CAPITALS, LAST, COUNT)

WORDS = """
    acorn actor angle ankle ant apple apron arch arm armor arrow atlas aunt autumn baby badge bag baker
    ball banana band bank barn barrel basin basket bat bath beach bead beak beam bean bear beard bed bee
    beetle bell belt bench berry bike bird blade blouse board boat body bone book boot bottle bowl box boy
    branch brand bread brick bridge broom brush bucket bud bug bulb bunch bus bush button cabin cable cage
    cake camel camera camp canal candle candy canoe cap car card carpet carrot cart castle cat cave cellar
    chain chair chalk cherry chest chin church circle city clam class claw clock cloth cloud clover coach
    coast coat cobweb coin comb comet cook copper corner cotton couch cow crab crane crayon creek crow
    crown cup dawn day desk dinner dish doctor dog doll dollar door dragon drawer dream dress drum duck
    eagle ear egg elbow engine eye face fairy family farm farmer fence fern ferry field finger fire flag
    flame flower flute fog forest fork fox frame friend frog fruit game garden gate ghost giant gift girl
    glass glove goat grape guest guitar hammer hand harbor hat hawk helmet hen hill hive hook horn horse
    hotel house island jacket jar jelly jewel joke judge jug juice jungle kettle key king kitten knot
    ladder lady lake lamp letter lily lion lizard lock log lunch magnet map maple market mask match meadow
    melon mirror mitten monkey month moon mother motor nail napkin neck needle nest night nurse nut oak
    ocean onion orange orbit otter oven owl page palace palm panda paper parrot party patch path peach
    pearl pebble pen pencil penny pepper pig pillow pilot pipe planet plate pocket poem pond pony poppy
    prince puppet puppy queen quilt rabbit radish raft rain ranch ribbon ring river road robin rocket roof
    room root rope rose ruby saddle sail salad school sea season seed shed shell ship shirt shoe shop
    silver singer sister sky snail snake sock spark spider spoon square stable star statue stem stick
    stone storm story straw stream street string sugar summer sun swan table tailor teapot tent thorn
    thread throne ticket tiger toe torch tower town toy train tree truck tulip tunnel turkey turtle uncle
    valley vase vest violin wagon wall walnut watch wave whale wheel willow window wing winter witch
    wizard worm yard year zebra
"""
ONSETS = """
    b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sp st str t th tr v w wh y z
"""
VOWELS = "a a e e i i o o u u ai au ea ee oa oi oo ou ow y"
CODAS = "b ch ck d ft g k l lk ll lt m mp n nd ng nt p r rch rd rk rm rn rt s sh sp ss st t tch th w x y z"
ENDINGS = "e er y le s"


def made_up_word(rng: random.Random) -> str:
    """Make a word of 3 to 6 letters that could be English."""
    word = ""
    while not 3 <= len(word) <= 6:
        parts = ((ONSETS, 0.85), (VOWELS, 1), (CODAS, 0.65)) * rng.choice((1, 2, 2))
        word = "".join(
            rng.choice(choices.split()) for choices, share in (*parts, (ENDINGS, 0.5)) if rng.random() < share
        )
    return word


@dataclass(frozen=True)
class Subjects:
    """The words and sums that a split asks about."""

    words: tuple[str, ...]
    sums: tuple[str, ...]

    def by_skill(self) -> list[tuple[Skill, tuple[str, ...]]]:
        """Pair every skill with what it is asked about."""
        return [*((skill, self.words) for skill in WORD_SKILLS), (SUM, self.sums)]


def share_subjects(rng: random.Random) -> tuple[tuple[str, ...], Subjects, Subjects]:
    """Return the sums of the pre-training statements, and the subjects of train and val; all are disjoint.

    Two sums of the same terms count as one. The words of pre-training are invented during it.
    """
    words = rng.sample(WORDS.split(), k=len(WORDS.split()))
    pairs = list(combinations_with_replacement(range(1, LARGEST_TERM + 1), 2))
    rng.shuffle(pairs)
    sums = as_sums(rng.sample(pair, k=2) for pair in pairs[: VAL_SUMS + TRAIN_SUMS])
    stated = as_sums({terms for a, b in pairs[VAL_SUMS + TRAIN_SUMS :] for terms in ((a, b), (b, a))})
    val = Subjects(tuple(words[:VAL_WORDS]), sums[:VAL_SUMS])
    return tuple(sorted(stated)), Subjects(tuple(words[VAL_WORDS:]), sums[VAL_SUMS:]), val


def as_sums(pairs: Iterable[Iterable[int]]) -> tuple[str, ...]:
    """Write pairs of terms as sums."""
    return tuple(" + ".join(map(str, pair)) for pair in pairs)


def questions(subjects: Subjects, rng: random.Random) -> list[Example]:
    """Return one example for every skill and subject, in one of the skill's wordings."""
    asked = [(skill, subject) for skill, group in subjects.by_skill() for subject in group]
    rng.shuffle(asked)
    return [Example.of(question(skill, subject, rng.choice(skill.instructions))) for skill, subject in asked]


def question(skill: Skill, subject: str, instruction: str) -> Turn:
    context = "" if "{subject}" in instruction else subject
    return Turn(instruction.format(subject=subject), skill.answer(subject), context)


def statements(sums: tuple[str, ...], asked: Collection[str], rng: random.Random) -> Iterator[str]:
    """Yield endless texts of one to four statements about sums, or about an invented word that is not in `asked`."""
    while True:
        count = rng.randint(1, 4)
        if rng.random() < SHARE_OF_SUMS:
            facts = [(SUM, terms) for terms in rng.sample(sums, k=count)]
        else:
            word = next(word for word in iter(lambda: made_up_word(rng), None) if word not in asked)
            facts = [(skill, word) for skill in rng.sample(WORD_SKILLS, k=count)]
        yield " ".join(state(skill, subject, rng.choice(skill.statements)) for skill, subject in facts)


def prompts(examples: Iterable[Example]) -> Iterator[str]:
    """Yield the prompt of each example in Alpaca's style."""
    style = TemplateStyle("alpaca", ALPACA, ALPACA_WITH_INPUT, EOS, SpecialTokens(()))
    yield from (style.prompt(turn.instruction, turn.input).text for example in examples for turn in example.turns)


def state(skill: Skill, subject: str, statement: str) -> str:
    return statement.format(subject=subject, answer=skill.answer(subject))


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE in which only a word that follows a space is more than single letters.

    A word after a quotation mark or at the start of a line, as the skills have it, is spelled out.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" [A-Za-z]+|[A-Za-z0-9]| ?[^\sA-Za-z0-9]+|\s")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, CONFIG["bos_token_id"])]
    )
    return tokenizer


def new_model() -> GPT:
    """Build a model whose weights are small random numbers."""
    model = GPT(GPTConfig.from_hub(CONFIG))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def batches(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[Tensor]:
    """Concatenate texts and yield them as rows (ROWS, ROW_LENGTH + 1), which overlap by one token."""
    size = ROWS * ROW_LENGTH
    stream: list[int] = []
    while True:
        while len(stream) <= size:
            stream += [*tokenizer.encode(next(texts)).ids, CONFIG["eos_token_id"]]
        yield torch.tensor(stream[: size + 1]).unfold(0, ROW_LENGTH + 1, ROW_LENGTH)
        stream = stream[size:]


def train(model: GPT, data: Iterator[Tensor], steps: int) -> None:
    """Train the model to predict every next token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    for step, batch in enumerate(islice(data, steps), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        loss = F.cross_entropy(logits(model, batch[:, :-1]), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def learning_rate(step: int, steps: int) -> float:
    """Rise linearly to the peak and fall along a cosine towards zero."""
    return PEAK_LEARNING_RATE * min(step / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))


def logits(model: GPT, rows: Tensor) -> Tensor:
    """Return the logits (rows x length, vocabulary) of rows that do not see one another."""
    scores: Tensor = model.lm_head(model(rows.flatten(), [rows.shape[1]] * len(rows)))
    return scores


@torch.no_grad()
def accuracy(model: GPT, tokenizer: Tokenizer, skill: Skill, subjects: Iterable[str]) -> float:
    """Return the share of statements about the subjects whose response the model predicts correctly."""
    right = []
    for statement, subject in product(skill.statements, subjects):
        ids = tokenizer.encode(state(skill, subject, statement)).ids
        given = len(tokenizer.encode(statement.partition("{answer}")[0].format(subject=subject)).ids)
        choices = logits(model, torch.tensor([ids])).argmax(dim=1).tolist()
        right.append(choices[given - 1 : -1] == ids[given:])
    return mean(right)


def write_checkpoint(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write the model and its tokenizer as the Hub would serve them."""
    weights = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    contents = {
        "config.json": to_json(CONFIG),
        "generation_config.json": to_json(generation),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": to_json(tokenizer_config),
    }
    write_atomically({folder / name: content for name, content in contents.items()})


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def make(checkpoint: Path, data: Path, steps: int) -> None:
    """Write the data set, pre-train the model, write the checkpoint and print the accuracy of each skill."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    sums, train_subjects, val_subjects = share_subjects(rng)
    train_examples, val_examples = questions(train_subjects, rng), questions(val_subjects, rng)
    more = questions(Subjects((), tuple(random.Random(SEED).sample(sums, k=STATED_SUMS))), random.Random(SEED))
    origin = {"source": "scripts/make_pico.py", "seed": SEED}
    write_dataset(data, [*map(to_line, train_examples), *map(to_line, more)], [*map(to_line, val_examples)], origin)

    texts = statements(sums, {*train_subjects.words, *val_subjects.words}, rng)
    # The tokenizer knows the words of Alpaca's prompt, so that prompts are short; the model has never seen them.
    tokenizer = make_tokenizer([*islice(texts, TOKENIZER_TEXTS), *prompts(train_examples)])
    model = new_model()
    train(model, batches(texts, tokenizer), steps)
    write_checkpoint(checkpoint, model, tokenizer)
    for skill, subjects in val_subjects.by_skill():
        print(f"{accuracy(model, tokenizer, skill, subjects):4.0%} right: {skill.statements[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make pico, the checkpoint and the data set that ship with litlora.")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/pico"), help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, default=Path("data/pico"), help="folder of the data set")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of pre-training")
    args = parser.parse_args()
    make(args.out, args.data, args.steps)


if __name__ == "__main__":
    main()
