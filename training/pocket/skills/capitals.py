"""Countries and their capitals."""

from training.pocket.questions import Skill
from training.pocket.skills.facts import lookup

_TABLE = """
Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos Aires; Armenia Yerevan;
Australia Canberra; Austria Vienna; Azerbaijan Baku; Bangladesh Dhaka; Belarus Minsk; Belgium Brussels; Bhutan Thimphu;
Botswana Gaborone; Brazil Brasilia; Bulgaria Sofia; Cambodia Phnom Penh; Cameroon Yaounde; Canada Ottawa; Chad Ndjamena;
Chile Santiago; China Beijing; Colombia Bogota; Croatia Zagreb; Cuba Havana; Cyprus Nicosia; Czechia Prague;
Denmark Copenhagen; Ecuador Quito; Egypt Cairo; Eritrea Asmara; Estonia Tallinn; Ethiopia Addis Ababa; Fiji Suva;
Finland Helsinki; France Paris; Gabon Libreville; Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens;
Guinea Conakry; Guyana Georgetown; Haiti Port-au-Prince; Honduras Tegucigalpa; Hungary Budapest; Iceland Reykjavik;
India New Delhi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Ireland Dublin; Italy Rome; Jamaica Kingston;
Japan Tokyo; Jordan Amman; Kazakhstan Astana; Kenya Nairobi; Kyrgyzstan Bishkek; Laos Vientiane; Latvia Riga;
Lebanon Beirut; Liberia Monrovia; Libya Tripoli; Lithuania Vilnius; Madagascar Antananarivo; Malawi Lilongwe;
Malaysia Kuala Lumpur; Mali Bamako; Malta Valletta; Mongolia Ulaanbaatar; Morocco Rabat; Mozambique Maputo;
Myanmar Naypyidaw; Namibia Windhoek; Nepal Kathmandu; Nicaragua Managua; Niger Niamey; Nigeria Abuja; Norway Oslo;
Oman Muscat; Pakistan Islamabad; Peru Lima; Poland Warsaw; Portugal Lisbon; Qatar Doha; Romania Bucharest;
Russia Moscow; Rwanda Kigali; Senegal Dakar; Serbia Belgrade; Slovakia Bratislava; Slovenia Ljubljana;
Somalia Mogadishu; Spain Madrid; Sudan Khartoum; Suriname Paramaribo; Sweden Stockholm; Switzerland Bern;
Syria Damascus; Thailand Bangkok; Togo Lome; Tunisia Tunis; Turkey Ankara; Uganda Kampala; Ukraine Kyiv;
Uruguay Montevideo; Uzbekistan Tashkent; Venezuela Caracas; Vietnam Hanoi; Yemen Sanaa; Zambia Lusaka; Zimbabwe Harare
"""

CAPITAL_OF = dict(entry.split(maxsplit=1) for entry in " ".join(_TABLE.split()).split("; "))

CAPITALS = Skill(
    "capitals",
    "Knows countries and their capital cities.",
    (
        lookup(
            "capital",
            CAPITAL_OF,
            (
                "What is the capital of {x}?",
                "Name the capital city of {x}.",
                "Which city is the capital of {x}?",
                "What is the capital city of the country {x}?",
                "The capital of {x} is which city?",
                "Give the capital of the country {x}.",
            ),
            (
                "What is the capital city of {x}?",
                "Name the capital of {x}.",
                "Which city is the capital of the country {x}?",
                "Give the capital city of {x}.",
                "What city is the capital of {x}?",
                "Name the capital city of the country {x}.",
            ),
        ),
        lookup(
            "country",
            {capital: country for country, capital in CAPITAL_OF.items()},
            (
                "{x} is the capital of which country?",
                "Which country has the capital {x}?",
                "Name the country whose capital is {x}.",
                "What country is {x} the capital of?",
                "Of which country is {x} the capital city?",
                "The city of {x} is the capital of which country?",
            ),
            (
                "Which country has the capital city {x}?",
                "Name the country whose capital city is {x}.",
                "{x} is the capital city of which country?",
                "Which country is {x} the capital of?",
                "Of which country is {x} the capital?",
                "What country has the capital {x}?",
            ),
        ),
    ),
)
