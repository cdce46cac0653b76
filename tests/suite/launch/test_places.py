"""--on: what a place may be told, and the line that each mistake gives."""

import pytest

from suite.config import CONFIGS, PlanError
from suite.launch.places import KINDS, Local, Place, Ray, Slurm, read_place

REFUSED = {
    "slrum": 'did you mean "slurm"?',
    "": "local, slurm, ray are allowed",
    "slurm:patition=gpu": 'did you mean "partition"?',
    "slurm:memory=16": "a size with its unit",
    "slurm:gpus=0": "a number from 1",
    "slurm:gpus=a100:x": "a number from 1",
    "slurm:array=0": "a number of elements from 1",
    "slurm:array=4%0": "a number of elements from 1",
    "slurm:array=1-4": "a number of elements from 1",
    "slurm:array=100001": "100,000",
    "slurm:time=4x": "a time above 0",
    "slurm:time=0": "a time above 0",
    "slurm:time=-3": "a time above 0",
    "slurm:time=2": "is not above the 120 seconds",
    "slurm:cpus=true": "an integer is needed",
    "slurm:cpus=2.5": "an integer is needed",
    "slurm:cpus=0": "greater than or equal to 1",
    "slurm:requeues=-1": "greater than or equal to 0",
    "slurm:partition=": "not an empty one",
    "slurm:partition=a\nb": "a line break",
    "slurm:setup=a\x1b[2J": "a character that does not show",
    "slurm:partition=a\u202eb": "a character that does not show",
    "slurm:partition=" + "a" * 1001: "1,000 are allowed",
    "slurm:nodelist=n1,n2": 'a value with a comma is written nodelist="A,B"',
    "slurm:partition": "OPTION=VALUE is needed",
    "slurm:partition=a,partition=b": "partition is given twice",
    "slurm:extra.mail-type=END,extra.mail-type=ALL": "extra.mail-type is given twice",
    "slurm:partition='a": "a ' is not closed",
    "slurm:extra.array=3": '"array" is set by the suite',
    "slurm:extra.wait=true": '"wait" is set by the suite',
    "slurm:extra.mem=3G": "has a field of its own here: memory",
    "slurm:extra.Mail=x": "is no long option of sbatch",
    "slurm:extra.mail-type=a\nb": "a line break",
    "slurm:,": "OPTION=VALUE is needed",
    "local:partition=x": 'unknown option "partition"',
    "ray:cpus=0": "greater than 0",
    "ray:10.0.0.1:6379,10.0.0.2:6379": "OPTION=VALUE is needed",
    "ray:runs=3": "unknown option",
    "ray:gpus": "OPTION=VALUE is needed",
    "nothing/here.yaml": "No such file",
    "configs/on/slurn.yaml": 'did you mean "configs/on/slurm.yaml"?',
}
FILES = {
    "partition: gpu": '"on" is missing',
    "on: slrum": '"on" is \'slrum\'; it is one of local, slurm, ray; did you mean "slurm"?',
    "on: slurm\npartiton: x": 'did you mean "partition"?',
    "on: slurm\naccount: 0123": "valid string",
    "on: slurm\ncpus: '4'": "write 4 without quotes",
    "on: slurm\nextra: [a]": "a mapping of sbatch's options",
    "on: slurm\nextra: {mail-type: {a: b}}": "text, a number or true",
    "on: slurm\nextra: {exclusive: false}": "leave it out",
    "on: slurm\nsetup: {a: b}": "a list of lines of shell",
    "on: slurm\nsetup: [[a]]": "a list of lines of shell",
    "on: slurm\ntime: true": "a time above 0",
    "- slurm": "a mapping with the keys",
    "on: [slurm": "line 1",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_one_line_that_says_what_is_allowed(text):
    with pytest.raises(PlanError) as caught:
        read_place(text)
    (line,) = caught.value.lines
    assert REFUSED[text] in line
    assert line.startswith("--on ")


@pytest.mark.parametrize("text", FILES)
def test_so_is_one_in_a_file(text, tmp_path):
    file = tmp_path / "place.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_place(str(file))
    (line,) = caught.value.lines
    assert FILES[text] in line


def test_all_mistakes_are_named_at_once():
    with pytest.raises(PlanError) as caught:
        read_place("slurm:patition=gpu,time=x,array=0")
    assert [line.partition(": ")[2].split()[0] for line in caught.value.lines] == ["unknown", "time", "array"]


def test_text_and_file_say_the_same(tmp_path):
    file = tmp_path / "place.yaml"
    file.write_text(
        "on: slurm\npartition: gpu\ntime: 4:00:00\ngpus: a100:2\ncpus: 8\nmemory: 16 GB\narray: 32%8\n"
        "nodelist: n[1,3],n7\nsetup: |\n  module load cuda\n  export A=1\n"
        "extra: {mail-type: END, exclusive: true, nice: 5}"
    )
    typed = read_place(
        "slurm:partition=gpu,time=4h,gpus=a100:2,cpus=8,memory=16GiB,array=32%8,nodelist='n[1,3],n7',"
        "extra.mail-type=END,extra.exclusive=true,extra.nice=5"
    )
    read = read_place(str(file))
    assert read.options.setup == ("module load cuda", "export A=1")
    assert read == Place("slurm", typed.options.model_copy(update={"setup": read.options.setup}))
    assert (read.options.elements, read.options.at_once, read.options.seconds) == (32, 8, 4 * 3600)
    assert read.options.memory == 16 * 2**30
    assert read.options.extra == {"mail-type": "END", "exclusive": None, "nice": "5"}


@pytest.mark.parametrize(
    ("given", "means"),
    {
        "90": "01:30:00",
        "5:30": "00:05:30",
        "4:00:00": "04:00:00",
        "1-2": "1-02:00:00",
        "1-2:30": "1-02:30:00",
        "30:00:00": "1-06:00:00",
        "1d": "1-00:00:00",
        "unlimited": "UNLIMITED",
    }.items(),
)
def test_times_are_slurms_own_or_have_a_unit(given, means):
    assert read_place(f"slurm:time={given}").options.time == means


def test_a_text_of_digits_stays_a_text_where_a_text_is_needed():
    assert read_place("slurm:account=0123,qos=1e3").options.account == "0123"


def test_an_address_needs_no_name():
    assert read_place("ray:10.0.0.1:6379,gpus=0.5").options == Ray(address="10.0.0.1:6379", gpus=0.5)
    assert read_place("ray:ray://head:10001").options.address == "ray://head:10001"
    assert read_place("ray") == Place("ray", Ray())
    assert read_place("local:jobs=2") == Place("local", Local(jobs=2))


@pytest.mark.parametrize("file", sorted((CONFIGS / "on").glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_are_places_and_are_found_from_anywhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = read_place(f"configs/on/{file.name}")
    assert place.kind == file.name.partition("_")[0].partition(".")[0]


def test_an_example_of_ones_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "on").mkdir(parents=True)
    (tmp_path / "configs" / "on" / "slurm.yaml").write_text("{on: slurm, partition: mine}")
    assert read_place("configs/on/slurm.yaml").options.partition == "mine"


def test_every_option_of_every_place_is_described():
    for model in KINDS.values():
        for name in model.model_fields:
            assert name in (model.__doc__ or "")


def test_a_place_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Slurm().array = "2"
