"""The text of the speedrun: the packages of Debian 12 that it is made of, and SHA-256 of its parts.

`setup/build_corpus.py --speedrun` makes it; `blt speedrun` takes no other.
"""

PARTS = {  # of its files
    "train.jsonl": "fb2857b2f5dea47c57088535bf0aba61d17f3b7fb855bc82fd680a8031f91554",
    "tune.jsonl": "3ff826150a0853c18802ff430b902a009cf5c50bd7126db017af24ad27a4691e",
    "valid.jsonl": "65845d00c13136171e94cc000e558c4d66f7933b1adcfa42ec32a2b12fc86077",
}
CUTS = {"train.jsonl": 30_222, "tune.jsonl": 600}  # documents, in the shuffled order
PYTHON = "3.11"
SNAPSHOT = [  # where the packages are still found once Debian has newer ones
    f"deb [check-valid-until=no signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
    f"https://snapshot.debian.org/archive/{archive}/20261130T000000Z {suite} main"
    for archive, suite in (
        ("debian", "bookworm"),
        ("debian", "bookworm-updates"),
        ("debian-security", "bookworm-security"),
    )
]
PACKAGES = {
    "anarchism": "15.3-3",
    "debian-handbook": "11.20220922",
    "dict-foldoc": "20230119-1",
    "dict-gcide": "0.48.5+nmu2",
    "gnome-user-docs": "43.0-2",
    "installation-guide-amd64": "20230508+deb12u1",
    "libpython3.11-minimal": "3.11.2-6+deb12u9",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "libpython3.11-testsuite": "3.11.2-6+deb12u9",
    "libreoffice-help-de": "4:7.4.7-1+deb12u14",
    "libreoffice-help-en-us": "4:7.4.7-1+deb12u14",
    "libreoffice-help-fr": "4:7.4.7-1+deb12u14",
    "libreoffice-help-ja": "4:7.4.7-1+deb12u14",
    "libreoffice-help-ko": "4:7.4.7-1+deb12u14",
    "libreoffice-help-ru": "4:7.4.7-1+deb12u14",
    "libreoffice-help-zh-cn": "4:7.4.7-1+deb12u14",
    "linux-doc-6.1": "6.1.192-3",
    "manpages": "6.03-2",
    "manpages-de": "4.18.1-1",
    "manpages-dev": "6.03-2",
    "manpages-fr": "4.18.1-1",
    "manpages-ja": "0.5.0.0.20221215+dfsg-1",
    "manpages-pl": "1:4.18.1-1",
    "manpages-ru": "4.18.1-1",
    "manpages-uk": "4.18.1-1",
    "manpages-zh": "1.6.4.0-1",
    "perl-doc": "5.36.0-7+deb12u4",
    "perl-modules-5.36": "5.36.0-7+deb12u4",
    "python3.11-doc": "3.11.2-6+deb12u9",
    "r-cran-janeaustenr": "1.0.0-1",
}
SOURCES = {  # the first digits of SHA-256 of the hashes of each source's documents
    "gcide": "270c0430d3ab978d",
    "foldoc": "fd0f7ea2b38fad20",
    "anarchism": "d987d0a817fbe88e",
    "debian-handbook": "c7bf89005fe033be",
    "gnome-user-docs": "bf20b7fc2b92a989",
    "install-guide": "866fe2e3794ff6b6",
    "man-de": "282d490fb474f949",
    "man-fr": "9d20844090c25e7b",
    "man-ja": "ec43222dc56e78e1",
    "man-zh": "ba989311984f561c",
    "man-ru": "f491423e8ac2e06d",
    "man-pl": "a0428e53dbd24445",
    "man-uk": "d6180246dee1169a",
    "help-de": "18190dfa0a8de8cf",
    "help-fr": "ad539cac2434e32c",
    "help-ja": "e8f0218652bf896f",
    "help-ko": "b99977ae08abfe86",
    "help-zh-cn": "fbdc47d08500c83f",
    "help-ru": "759c583b7d4ba1ee",
    "help-en-us": "ea7c0696874edbf1",
    "man-en": "e40df1efb28b3ab3",
    "linux-doc": "afce9b4b7e3ef365",
    "python-doc": "785e800b928eebeb",
    "perl-doc": "9f7d47b209cb3984",
    "py-stdlib": "cef492aabf7caa19",
    "py-tests": "5afe3b166d635b40",
    "perl-modules": "ea03b580b95eb4f0",
    "austen": "8c7697f86ed4a4e0",
}
