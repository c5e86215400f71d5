"""The first 86 chemical elements: names, symbols and atomic numbers."""

from training.pocket.questions import Skill
from training.pocket.skills.facts import lookup

_TABLE = """
H Hydrogen He Helium Li Lithium Be Beryllium B Boron C Carbon N Nitrogen O Oxygen F Fluorine Ne Neon Na Sodium Mg
Magnesium Al Aluminium Si Silicon P Phosphorus S Sulfur Cl Chlorine Ar Argon K Potassium Ca Calcium Sc Scandium Ti
Titanium V Vanadium Cr Chromium Mn Manganese Fe Iron Co Cobalt Ni Nickel Cu Copper Zn Zinc Ga Gallium Ge Germanium
As Arsenic Se Selenium Br Bromine Kr Krypton Rb Rubidium Sr Strontium Y Yttrium Zr Zirconium Nb Niobium Mo
Molybdenum Tc Technetium Ru Ruthenium Rh Rhodium Pd Palladium Ag Silver Cd Cadmium In Indium Sn Tin Sb Antimony Te
Tellurium I Iodine Xe Xenon Cs Caesium Ba Barium La Lanthanum Ce Cerium Pr Praseodymium Nd Neodymium Pm Promethium
Sm Samarium Eu Europium Gd Gadolinium Tb Terbium Dy Dysprosium Ho Holmium Er Erbium Tm Thulium Yb Ytterbium Lu
Lutetium Hf Hafnium Ta Tantalum W Tungsten Re Rhenium Os Osmium Ir Iridium Pt Platinum Au Gold Hg Mercury Tl
Thallium Pb Lead Bi Bismuth Po Polonium At Astatine Rn Radon
"""

_CELLS = _TABLE.split()

SYMBOLS = dict(zip([name.lower() for name in _CELLS[1::2]], _CELLS[::2], strict=True))
NUMBERS = {name: str(number) for number, name in enumerate(SYMBOLS, 1)}

ELEMENTS = Skill(
    "elements",
    "Knows the chemical elements: symbols, names and atomic numbers.",
    (
        lookup(
            "symbol",
            SYMBOLS,
            (
                "What is the chemical symbol of {x}?",
                "Give the symbol for the element {x}.",
                "Which symbol does the element {x} have?",
                "What symbol stands for {x} in the periodic table?",
                "How is the element {x} abbreviated?",
                "Write the chemical symbol for {x}.",
            ),
            (
                "What is the symbol of the element {x}?",
                "Which chemical symbol stands for {x}?",
                "Give the chemical symbol of {x}.",
                "Write the symbol of the chemical element {x}.",
                "What symbol does {x} have in the periodic table?",
                "What is the symbol for {x} in the periodic table?",
            ),
        ),
        lookup(
            "number",
            NUMBERS,
            (
                "What is the atomic number of {x}?",
                "Give the atomic number of the element {x}.",
                "Which atomic number does {x} have?",
                "How many protons does an atom of {x} have?",
                "How many protons does an atom of the element {x} have?",
                "How many protons are in the element {x}?",
                "What atomic number does the element {x} have?",
                "What number does the element {x} have in the periodic table?",
                "Write the atomic number for {x}.",
            ),
            (
                "What is the atomic number of the element {x}?",
                "Which atomic number does the element {x} have?",
                "Give the atomic number for {x}.",
                "How many protons does the element {x} have?",
                "What atomic number does {x} have in the periodic table?",
                "Write the atomic number of the chemical element {x}.",
            ),
        ),
        lookup(
            "named_by_symbol",
            {symbol: name for name, symbol in SYMBOLS.items()},
            (
                "Which element has the symbol {x}?",
                "Name the element with the chemical symbol {x}.",
                "What element does the symbol {x} stand for?",
                "The chemical symbol {x} stands for which element?",
                "Give the name of the element with the symbol {x}.",
            ),
            (
                "Which chemical element has the symbol {x}?",
                "Name the chemical element with the symbol {x}.",
                "Which element does the chemical symbol {x} stand for?",
                "What element has the chemical symbol {x}?",
                "Give the name of the chemical element with symbol {x}.",
            ),
        ),
        lookup(
            "named_by_number",
            {number: name for name, number in NUMBERS.items()},
            (
                "Which element has the atomic number {x}?",
                "Name the element with the atomic number {x}.",
                "What element has {x} protons?",
                "Which element is number {x} in the periodic table?",
                "Give the name of the element with atomic number {x}.",
            ),
            (
                "Which chemical element has the atomic number {x}?",
                "Name the chemical element with atomic number {x}.",
                "What element has the atomic number {x}?",
                "Which chemical element has {x} protons?",
                "What element is number {x} in the periodic table?",
            ),
        ),
    ),
)
