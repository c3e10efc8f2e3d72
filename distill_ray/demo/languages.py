"""The word lists and sentence templates of the demo: twelve labelled languages and some that are on no list.

Written for this project. A language has slots (`who`, `verb`, ...), each a list of words or short phrases
that fit any template of that language, so every combination is a grammatical sentence: subjects are third
person singular (and masculine where a verb would agree), verbs are transitive and in the present tense,
objects carry their own article and case. One language has about 90 slot entries and 14 templates, which makes
several million sentences.

`markers` are common words by which a reader would know the language; the demo teacher names two of them as
evidence.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language: `slots` maps a slot name to its fillers, `templates` are format strings over the"
    " slots."""

    name: str
    slots: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]
    markers: frozenset[str]


def _language(name: str, slots: dict[str, str], templates: str, markers: str = "") -> Language:
    """Build a language from compact text: fillers split at "|", templates one a line, markers at blanks."""
    return Language(
        name,
        {slot: tuple(part.strip() for part in text.split("|")) for slot, text in slots.items()},
        tuple(line.strip() for line in templates.strip().splitlines()),
        frozenset(markers.split()),
    )


ENGLISH = _language(
    "English",
    {
        "who": "the teacher|my brother|our neighbour|the old doctor|a young farmer|the bus driver|her uncle"
        "|the new cook"
        "|my best friend|the little girl|the painter|his grandmother|the tired nurse|their cousin",
        "verb": "buys|finds|forgets|brings|describes|needs|draws|hides|shows|sells|carries|wants",
        "inf": "buy|find|forget|bring|describe|draw|hide|show|sell|carry",
        "thing": "the red book|a warm coat|the old map|fresh bread|a small gift|the long letter|two tickets"
        "|the green bag"
        "|a cup of tea|the broken clock|some apples|the blue bicycle|a new key|the heavy box|cheap flowers"
        "|the camera",
        "place": "in the garden|at the station|near the river|in the kitchen|at school|behind the church"
        "|in the market"
        "|on the bridge|at the office|in the library|by the sea|in the village",
        "time": "today|every morning|after dinner|on Sunday|in the evening|before work|this week|at night"
        "|in winter"
        "|once a month",
        "comp": "with his son|with a friend|with the children|without help|with our team|with her sister"
        "|with the guests",
        "adj": "cold|beautiful|expensive|quiet|dangerous|strange|wonderful|boring|difficult|empty",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    {who} wants to {inf} {thing} {time}.
    i think that {who} {verb} {thing} {time}.
    why does {who} {inf} {thing} {place}?
    {who} does not {inf} {thing} {comp}.
    it is very {adj} {place} {time}.
    we saw {who} {place} {comp}.
    can you {inf} {thing} {comp} {time}?
    if it rains, {who} will {inf} {thing}.
    {who} {verb} {thing} because it is {adj} {place}.
    there is {thing} {place}, but {who} should not {inf} it.
    please do not {inf} {thing} {place} {time}.
    {who} said that it was {adj} {place}.
    """,
    "the a an is it was does not to of in at on with without and that will can you we i why because if there"
    " but this"
    " every his her our my their before after please should",
)

GERMAN = _language(
    "German",
    {
        "who": "der Lehrer|mein Bruder|unser Nachbar|die alte Ärztin|ein junger Bauer|der Busfahrer|ihr Onkel"
        "|die neue Köchin|mein bester Freund|das kleine Mädchen|der Maler|seine Großmutter"
        "|die müde Pflegerin|unser Vetter",
        "verb": "kauft|findet|vergisst|bringt|beschreibt|braucht|zeichnet|versteckt|zeigt|verkauft|trägt|sucht",
        "inf": "kaufen|finden|vergessen|bringen|beschreiben|zeichnen|verstecken|zeigen|verkaufen|suchen",
        "thing": "das rote Buch|einen warmen Mantel|die alte Karte|frisches Brot|ein kleines Geschenk"
        "|den langen Brief"
        "|zwei Fahrkarten|die grüne Tasche|eine Tasse Tee|die kaputte Uhr|einige Äpfel|das blaue Fahrrad"
        "|einen neuen Schlüssel|die schwere Kiste|billige Blumen|den Fotoapparat",
        "place": "im Garten|am Bahnhof|in der Küche|neben dem Fluss|in der Schule|hinter der Kirche"
        "|auf dem Markt"
        "|auf der Brücke|im Büro|in der Bibliothek|am Meer|im Dorf",
        "time": "heute|jeden Morgen|nach dem Essen|am Sonntag|am Abend|vor der Arbeit|diese Woche"
        "|in der Nacht|im Winter"
        "|einmal im Monat",
        "comp": "mit seinem Sohn|mit einem Freund|mit den Kindern|ohne Hilfe|mit unserer Mannschaft"
        "|mit ihrer Schwester"
        "|mit den Gästen",
        "adj": "kalt|schön|teuer|ruhig|gefährlich|seltsam|wunderbar|langweilig|schwierig|leer",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {verb} {who} {thing} {place}.
    {who} möchte {time} {thing} {inf}.
    ich glaube, dass {who} {place} {thing} {verb}.
    warum will {who} {place} {thing} {inf}?
    {who} kann {thing} nicht {comp} {inf}.
    es ist {time} sehr {adj} {place}.
    wir wissen, dass {who} {comp} {place} wartet.
    kannst du {time} {thing} {inf}?
    wenn es regnet, wird {who} {thing} {inf}.
    {who} {verb} {thing}, weil es {place} {adj} ist.
    {place} gibt es {thing}, aber {who} ist nicht da.
    bitte {thing} nicht {place} {inf}, das ist {adj}.
    {who} hat gesagt, dass es {place} {adj} war.
    """,
    "der die das den dem ein eine einen einem ist nicht und ich du wir es sehr mit ohne im am auf dass weil"
    " wenn wird kann"
    " warum aber mein unser ihr seine möchte hat haben war gibt bitte jeden diese vor nach",
)

FRENCH = _language(
    "French",
    {
        "who": "le professeur|mon frère|notre voisin|la vieille dame|un jeune fermier|le chauffeur|son oncle"
        "|la cuisinière"
        "|mon meilleur ami|la petite fille|le peintre|sa grand-mère|l'infirmière|leur cousin",
        "verb": "achète|trouve|oublie|apporte|décrit|cherche|dessine|cache|montre|vend|porte|regarde",
        "inf": "acheter|trouver|oublier|apporter|décrire|chercher|dessiner|cacher|montrer|vendre",
        "thing": "le livre rouge|un manteau chaud|la vieille carte|du pain frais|un petit cadeau"
        "|la longue lettre"
        "|deux billets|le sac vert|une tasse de thé|la montre cassée|quelques pommes|le vélo bleu"
        "|une nouvelle clé"
        "|la boîte lourde|des fleurs|l'appareil photo",
        "place": "dans le jardin|à la gare|près de la rivière|dans la cuisine|à l'école|derrière l'église"
        "|au marché"
        "|sur le pont|au bureau|à la bibliothèque|au bord de la mer|dans le village",
        "time": "aujourd'hui|chaque matin|après le dîner|le dimanche|ce soir|avant le travail|cette semaine"
        "|la nuit"
        "|en hiver|une fois par mois",
        "comp": "avec son fils|avec un ami|avec les enfants|sans aide|avec notre équipe|avec sa sœur|avec les invités",
        "adj": "froid|beau|cher|calme|dangereux|étrange|merveilleux|ennuyeux|difficile|vide",
    },
    """
    {who} {verb} {thing} {place}.
    {time}, {who} {verb} {thing} {place}.
    {who} veut {inf} {thing} {time}.
    je crois que {who} {verb} {thing} {time}.
    pourquoi est-ce que {who} {verb} {thing} {place}?
    {who} ne peut pas {inf} {thing} {comp}.
    il fait très {adj} {place} {time}.
    nous avons vu {who} {place} {comp}.
    peux-tu {inf} {thing} {comp} {time}?
    s'il pleut, {who} va {inf} {thing}.
    {who} {verb} {thing} parce que c'est {adj} {place}.
    il y a {thing} {place}, mais {who} n'est pas là.
    il ne faut pas {inf} {thing} {place}.
    {who} a dit que c'était {adj} {place}.
    """,
    "le la les un une des du de est ne pas et je nous il très avec sans dans sur près que qui parce mais son"
    " sa mon notre"
    " au à ce cette chaque veut peut va c'est pourquoi est-ce après avant s'il",
)

SPANISH = _language(
    "Spanish",
    {
        "who": "el maestro|mi hermano|nuestro vecino|la vieja doctora|un joven granjero|el conductor|su tío"
        "|la nueva cocinera|mi mejor amigo|la niña pequeña|el pintor|su abuela|la enfermera|el primo de Juan",
        "verb": "compra|encuentra|olvida|trae|describe|necesita|dibuja|esconde|muestra|vende|lleva|busca",
        "inf": "comprar|encontrar|olvidar|traer|describir|dibujar|esconder|mostrar|vender|buscar",
        "thing": "el libro rojo|un abrigo caliente|el mapa viejo|pan fresco|un pequeño regalo|la carta larga"
        "|dos billetes"
        "|la bolsa verde|una taza de té|el reloj roto|unas manzanas|la bicicleta azul|una llave nueva"
        "|la caja pesada"
        "|flores baratas|la cámara",
        "place": "en el jardín|en la estación|cerca del río|en la cocina|en la escuela|detrás de la iglesia"
        "|en el mercado"
        "|sobre el puente|en la oficina|en la biblioteca|junto al mar|en el pueblo",
        "time": "hoy|cada mañana|después de la cena|el domingo|por la tarde|antes del trabajo|esta semana"
        "|por la noche"
        "|en invierno|una vez al mes",
        "comp": "con su hijo|con un amigo|con los niños|sin ayuda|con nuestro equipo|con su hermana|con los invitados",
        "adj": "frío|hermoso|caro|tranquilo|peligroso|extraño|maravilloso|aburrido|difícil|vacío",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    {who} quiere {inf} {thing} {time}.
    creo que {who} {verb} {thing} {time}.
    ¿por qué {verb} {who} {thing} {place}?
    {who} no puede {inf} {thing} {comp}.
    todo está muy {adj} {place} {time}.
    vimos a {who} {place} {comp}.
    ¿puedes {inf} {thing} {comp} {time}?
    si llueve, {who} va a {inf} {thing}.
    {who} {verb} {thing} porque es muy {adj}.
    hay {thing} {place}, pero {who} no está aquí.
    por favor, no debes {inf} {thing} {place}.
    {who} dijo que era {adj} estar {place}.
    """,
    "el la los las un una de del en y no está es muy con sin que porque pero si su mi nuestro por qué hay"
    " quiere puede va"
    " al creo vimos cada esta todo antes después unas",
)

TURKISH = _language(
    "Turkish",
    {
        "who": "öğretmen|erkek kardeşim|komşumuz|yaşlı doktor|genç çiftçi|otobüs şoförü|onun amcası|yeni aşçı"
        "|en iyi arkadaşım|küçük kız|ressam|büyükannesi|yorgun hemşire|kuzenimiz",
        "verb": "alıyor|buluyor|unutuyor|getiriyor|anlatıyor|arıyor|çiziyor|saklıyor|gösteriyor|satıyor"
        "|taşıyor|istiyor",
        "inf": "almak|bulmak|unutmak|getirmek|anlatmak|çizmek|saklamak|göstermek|satmak|aramak",
        "thing": "kırmızı kitabı|sıcak bir palto|eski haritayı|taze ekmek|küçük bir hediye|uzun mektubu"
        "|iki bilet"
        "|yeşil çantayı|bir bardak çay|bozuk saati|birkaç elma|mavi bisikleti|yeni bir anahtar|ağır kutuyu"
        "|ucuz çiçekler"
        "|fotoğraf makinesini",
        "place": "bahçede|istasyonda|nehrin yanında|mutfakta|okulda|caminin arkasında|pazarda"
        "|köprünün üstünde|ofiste"
        "|kütüphanede|deniz kenarında|köyde",
        "time": "bugün|her sabah|akşam yemeğinden sonra|pazar günü|akşamleyin|işten önce|bu hafta|geceleyin"
        "|kışın"
        "|ayda bir kez",
        "comp": "oğluyla birlikte|bir arkadaşıyla|çocuklarla|yardım almadan|takımımızla|kız kardeşiyle|misafirlerle",
        "adj": "soğuk|güzel|pahalı|sessiz|tehlikeli|garip|harika|sıkıcı|zor|boş",
    },
    """
    {who} {place} {thing} {verb}.
    {time} {who} {place} {thing} {verb}.
    {who} {time} {thing} {inf} istiyor.
    bence {who} {time} {thing} {verb}.
    {who} neden {place} {thing} {verb}?
    {who} {comp} {thing} {inf} istemiyor.
    {place} hava {time} çok {adj} oluyor.
    biz {who} ile {place} {time} karşılaştık.
    {comp} {thing} {inf} ister misin?
    yağmur yağarsa {who} {thing} {inf} zorunda.
    {who} {thing} {verb}, çünkü {place} her şey {adj}.
    {place} {thing} {inf} mümkün, ama {who} burada değil.
    lütfen {time} {place} {thing} {inf} için gel.
    {who} {place} her şeyin {adj} olduğunu söyledi.
    """,
    "bir her bu çok için ile değil çünkü ama neden biz bence ister misin istiyor istemiyor zorunda şey şeyin"
    " hava lütfen"
    " oluyor birlikte yeni en iki sonra önce birkaç burada olduğunu söyledi yağmur gel kız",
)

VIETNAMESE = _language(
    "Vietnamese",
    {
        "who": "thầy giáo|anh trai tôi|người hàng xóm|ông bác sĩ già|người nông dân trẻ|bác tài xế"
        "|chú của cô ấy"
        "|người đầu bếp mới|bạn thân của tôi|cô bé nhỏ|người họa sĩ|bà ngoại tôi|cô y tá|em họ của tôi",
        "verb": "mua|tìm thấy|quên|mang theo|miêu tả|cần|vẽ|giấu|cho xem|bán|xách|muốn có",
        "inf": "mua|tìm|quên|mang|miêu tả|vẽ|giấu|cho xem|bán|giữ",
        "thing": "quyển sách đỏ|một chiếc áo ấm|tấm bản đồ cũ|bánh mì mới|một món quà nhỏ|lá thư dài"
        "|hai tấm vé"
        "|cái túi xanh|một tách trà|chiếc đồng hồ hỏng|vài quả táo|chiếc xe đạp|một chìa khóa mới"
        "|cái hộp nặng"
        "|mấy bông hoa|cái máy ảnh",
        "place": "trong vườn|ở nhà ga|gần bờ sông|trong bếp|ở trường học|sau nhà thờ|ngoài chợ|trên cầu"
        "|ở văn phòng"
        "|trong thư viện|bên bờ biển|ở làng",
        "time": "hôm nay|mỗi buổi sáng|sau bữa tối|vào chủ nhật|vào buổi chiều|trước giờ làm|tuần này|ban đêm"
        "|vào mùa đông|mỗi tháng một lần",
        "comp": "với con trai|với một người bạn|cùng các em nhỏ|không cần giúp đỡ|cùng đội của chúng tôi"
        "|với chị gái"
        "|cùng khách mời",
        "adj": "lạnh|đẹp|đắt|yên tĩnh|nguy hiểm|lạ|tuyệt vời|buồn chán|khó khăn|vắng vẻ",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    {who} muốn {inf} {thing} {time}.
    tôi nghĩ rằng {who} {verb} {thing} {time}.
    tại sao {who} lại {inf} {thing} {place}?
    {who} không {inf} {thing} {comp}.
    {place} {time} rất {adj}.
    chúng tôi đã gặp {who} {place} {comp}.
    bạn có thể {inf} {thing} {comp} không?
    nếu trời mưa thì {who} sẽ {inf} {thing}.
    {who} {verb} {thing} vì {place} rất {adj}.
    có {thing} {place}, nhưng {who} không biết.
    xin đừng {inf} {thing} {place} {time}.
    {who} nói rằng {place} thật {adj}.
    """,
    "của không một người tôi rất và với cùng trong ở trên gần sau vào đã sẽ nếu thì vì nhưng rằng tại sao"
    " lại có thể được"
    " chúng bạn cô mỗi xin đừng thật muốn các trời hôm",
)

RUSSIAN = _language(
    "Russian",
    {
        "who": "учитель|мой брат|наш сосед|старый врач|молодой фермер|водитель автобуса|её дядя|новый повар"
        "|мой лучший друг|маленькая девочка|художник|его бабушка|уставшая медсестра|их двоюродный брат",
        "verb": "покупает|находит|забывает|приносит|описывает|ищет|рисует|прячет|показывает|продаёт|несёт|берёт",
        "inf": "купить|найти|забыть|принести|описать|нарисовать|спрятать|показать|продать|взять",
        "thing": "красную книгу|тёплое пальто|старую карту|свежий хлеб|маленький подарок|длинное письмо"
        "|два билета"
        "|зелёную сумку|чашку чая|сломанные часы|несколько яблок|синий велосипед|новый ключ|тяжёлый ящик"
        "|дешёвые цветы|фотоаппарат",
        "place": "в саду|на вокзале|около реки|на кухне|в школе|за церковью|на рынке|на мосту|в офисе"
        "|в библиотеке"
        "|у моря|в деревне",
        "time": "сегодня|каждое утро|после ужина|в воскресенье|вечером|перед работой|на этой неделе|ночью"
        "|зимой"
        "|раз в месяц",
        "comp": "со своим сыном|вместе с другом|с детьми|без помощи|с нашей командой|с сестрой|с гостями",
        "adj": "холодно|красиво|дорого|тихо|опасно|странно|чудесно|скучно|трудно|пусто",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    {who} хочет {inf} {thing} {time}.
    я думаю, что {who} {verb} {thing} {time}.
    почему {who} {verb} {thing} {place}?
    {who} не может {inf} {thing} {comp}.
    {place} {time} очень {adj}.
    мы знаем, что {who} {place} {comp}.
    ты можешь {inf} {thing} {comp}?
    если пойдёт дождь, {who} должен {inf} {thing}.
    {who} {verb} {thing}, потому что {place} {adj}.
    {place} можно {inf} {thing}, но {who} не знает об этом.
    пожалуйста, не надо {inf} {thing} {place}.
    {who} говорит, что {place} было {adj}.
    """,
    "и в на не что с со у за но мой наш его её их очень почему потому если хочет может можно я мы ты без"
    " каждое после перед"
    " вместе около должен пожалуйста надо говорит было знаем думаю этом раз",
)

ARABIC = _language(
    "Arabic",
    {
        "who": "المعلم|أخي الكبير|جارنا|الطبيب العجوز|الفلاح الشاب|سائق الحافلة|عمها|الطباخ الجديد"
        "|صديقي المفضل"
        "|الولد الصغير|الرسام|جده|الممرض المتعب|ابن عمهم",
        "verb": "يشتري|يجد|ينسى|يحضر|يصف|يحتاج|يرسم|يخفي|يعرض|يبيع|يحمل|يريد",
        "inf": "يشتري|يجد|ينسى|يحضر|يصف|يرسم|يخفي|يعرض|يبيع|يحمل",
        "thing": "الكتاب الأحمر|معطفا دافئا|الخريطة القديمة|خبزا طازجا|هدية صغيرة|الرسالة الطويلة|تذكرتين"
        "|الحقيبة الخضراء|كوبا من الشاي|الساعة المكسورة|بعض التفاح|الدراجة الزرقاء|مفتاحا جديدا"
        "|الصندوق الثقيل"
        "|زهورا رخيصة|آلة التصوير",
        "place": "في الحديقة|في المحطة|قرب النهر|في المطبخ|في المدرسة|خلف المسجد|في السوق|على الجسر|في المكتب"
        "|في المكتبة|على شاطئ البحر|في القرية",
        "time": "اليوم|كل صباح|بعد العشاء|يوم الأحد|في المساء|قبل العمل|هذا الأسبوع|في الليل|في الشتاء|مرة كل شهر",
        "comp": "مع ابنه|مع صديق|مع الأطفال|بدون مساعدة|مع فريقنا|مع أخته|مع الضيوف",
        "adj": "بارد|جميل|غال|هادئ|خطير|غريب|رائع|ممل|صعب|فارغ",
    },
    """
    {verb} {who} {thing} {place}.
    {time} {verb} {who} {thing} {place}.
    {who} يريد أن {inf} {thing} {time}.
    أعتقد أن {who} {verb} {thing} {time}.
    لماذا {verb} {who} {thing} {place}؟
    {who} لا {inf} {thing} {comp}.
    المكان {adj} جدا {place} {time}.
    رأينا {who} {place} {comp}.
    هل {verb} {who} {thing} {comp}؟
    إذا نزل المطر فسوف {inf} {who} {thing}.
    {who} {verb} {thing} لأن الجو {adj} {place}.
    هناك {thing} {place} ولكن {who} ليس هنا.
    من فضلك لا تترك {thing} {place} {time}.
    قال {who} إن الجو {adj} {place}.
    """,
    "في من على مع أن لا هل لماذا لأن كل بعد قبل هذا هناك هنا ليس ولكن إذا قال جدا يريد أعتقد بدون المكان"
    " الجو رأينا يوم فسوف"
    " إن المطر خلف قرب",
)

URDU = _language(
    "Urdu",
    {
        "who": "استاد|میرا بھائی|ہمارا پڑوسی|بوڑھا ڈاکٹر|نوجوان کسان|بس ڈرائیور|اس کا چچا|نیا باورچی"
        "|میرا اچھا دوست"
        "|چھوٹا لڑکا|مصور|اس کا دادا|تھکا ہوا نرس|ان کا کزن",
        "verb": "خریدتا|ڈھونڈتا|بھولتا|لاتا|بیان کرتا|چاہتا|بناتا|چھپاتا|دکھاتا|بیچتا|اٹھاتا|دیکھتا",
        "inf": "خریدنا|ڈھونڈنا|بھولنا|لانا|بیان کرنا|بنانا|چھپانا|دکھانا|بیچنا|اٹھانا",
        "thing": "سرخ کتاب|گرم کوٹ|پرانا نقشہ|تازہ روٹی|ایک چھوٹا تحفہ|لمبا خط|دو ٹکٹ|ہرا تھیلا|چائے کی پیالی"
        "|ٹوٹی ہوئی گھڑی|کچھ سیب|نیلی سائیکل|ایک نئی چابی|بھاری ڈبہ|سستے پھول|کیمرہ",
        "place": "باغ میں|اسٹیشن پر|دریا کے پاس|باورچی خانے میں|اسکول میں|مسجد کے پیچھے|بازار میں|پل پر"
        "|دفتر میں"
        "|کتب خانے میں|سمندر کے کنارے|گاؤں میں",
        "time": "آج|ہر صبح|کھانے کے بعد|اتوار کو|شام کو|کام سے پہلے|اس ہفتے|رات کو|سردیوں میں|مہینے میں ایک بار",
        "comp": "اپنے بیٹے کے ساتھ|ایک دوست کے ساتھ|بچوں کے ساتھ|مدد کے بغیر|ہماری ٹیم کے ساتھ|بہن کے ساتھ"
        "|مہمانوں کے ساتھ",
        "adj": "ٹھنڈا|خوبصورت|مہنگا|خاموش|خطرناک|عجیب|شاندار|بیزار کن|مشکل|خالی",
    },
    """
    {who} {place} {thing} {verb} ہے۔
    {time} {who} {place} {thing} {verb} ہے۔
    {who} {time} {thing} {inf} چاہتا ہے۔
    میرا خیال ہے کہ {who} {thing} {verb} ہے۔
    {who} {place} {thing} کیوں {verb} ہے؟
    {who} {comp} {thing} نہیں {verb} ہے۔
    {place} {time} سب کچھ بہت {adj} ہے۔
    ہم نے سنا ہے کہ {who} {place} رہتا ہے۔
    کیا {who} {comp} {thing} {verb} ہے؟
    اگر بارش ہوئی تو {who} {thing} نہیں {verb} ہے۔
    {who} {thing} {verb} ہے کیونکہ {place} موسم {adj} ہے۔
    {place} {thing} ہے لیکن {who} وہاں نہیں ہے۔
    براہ کرم {place} {thing} مت {inf}۔
    {who} کہتا ہے کہ {place} سب {adj} تھا۔
    """,
    "ہے میں کے کی کا کو پر سے نے اور کہ نہیں بہت کیا کیوں کیونکہ لیکن اگر تو یہ وہ ہم ساتھ ہر اس ایک میرا"
    " اپنے بغیر سب"
    " مت تھا چاہتا کہتا خیال وہاں پاس",
)

HINDI = _language(
    "Hindi",
    {
        "who": "अध्यापक|मेरा भाई|हमारा पड़ोसी|बूढ़ा डॉक्टर|जवान किसान|बस चालक|उसका चाचा|नया रसोइया"
        "|मेरा अच्छा दोस्त"
        "|छोटा लड़का|चित्रकार|उसका दादा|थका हुआ सिपाही|उनका मामा",
        "verb": "खरीदता|ढूँढता|भूलता|लाता|समझाता|चाहता|बनाता|छिपाता|दिखाता|बेचता|उठाता|देखता",
        "inf": "खरीदना|ढूँढना|भूलना|लाना|समझाना|बनाना|छिपाना|दिखाना|बेचना|उठाना",
        "thing": "लाल किताब|गरम कोट|पुराना नक्शा|ताज़ी रोटी|एक छोटा उपहार|लंबी चिट्ठी|दो टिकट|हरा थैला"
        "|चाय का प्याला"
        "|टूटी हुई घड़ी|कुछ सेब|नीली साइकिल|एक नई चाबी|भारी डिब्बा|सस्ते फूल|कैमरा",
        "place": "बगीचे में|स्टेशन पर|नदी के पास|रसोई में|विद्यालय में|मंदिर के पीछे|बाज़ार में|पुल पर"
        "|दफ़्तर में"
        "|पुस्तकालय में|समुद्र के किनारे|गाँव में",
        "time": "आज|हर सुबह|खाने के बाद|रविवार को|शाम को|काम से पहले|इस हफ़्ते|रात को|सर्दियों में|महीने में एक बार",
        "comp": "अपने बेटे के साथ|एक दोस्त के साथ|बच्चों के साथ|मदद के बिना|हमारी टीम के साथ|बहन के साथ|मेहमानों के साथ",
        "adj": "ठंडा|सुंदर|महँगा|शांत|खतरनाक|अजीब|शानदार|उबाऊ|कठिन|खाली",
    },
    """
    {who} {place} {thing} {verb} है।
    {time} {who} {place} {thing} {verb} है।
    {who} {time} {thing} {inf} चाहता है।
    मुझे लगता है कि {who} {thing} {verb} है।
    {who} {place} {thing} क्यों {verb} है?
    {who} {comp} {thing} नहीं {verb} है।
    {place} {time} सब कुछ बहुत {adj} है।
    हमने सुना है कि {who} {place} रहता है।
    क्या {who} {comp} {thing} {verb} है?
    अगर बारिश हुई तो {who} {thing} नहीं {verb} है।
    {who} {thing} {verb} है क्योंकि {place} मौसम {adj} है।
    {place} {thing} है लेकिन {who} वहाँ नहीं है।
    कृपया {place} {thing} मत {inf}।
    {who} कहता है कि {place} सब {adj} था।
    """,
    "है में के की का को पर से ने और कि नहीं बहुत क्या क्यों क्योंकि लेकिन अगर तो यह वह हम साथ हर इस एक मेरा"
    " अपने बिना सब मत"
    " था चाहता कहता मुझे लगता वहाँ पास",
)

GREEK = _language(
    "Greek",
    {
        "who": "ο δάσκαλος|ο αδελφός μου|ο γείτονάς μας|η ηλικιωμένη γιατρός|ένας νέος αγρότης"
        "|ο οδηγός του λεωφορείου"
        "|ο θείος της|η καινούρια μαγείρισσα|ο καλύτερός μου φίλος|το μικρό κορίτσι|ο ζωγράφος|η γιαγιά του"
        "|η κουρασμένη νοσοκόμα|ο ξάδελφός τους",
        "verb": "αγοράζει|βρίσκει|ξεχνά|φέρνει|περιγράφει|χρειάζεται|σχεδιάζει|κρύβει|δείχνει|πουλάει|κουβαλάει|ψάχνει",
        "inf": "αγοράσει|βρει|ξεχάσει|φέρει|περιγράψει|σχεδιάσει|κρύψει|δείξει|πουλήσει|κουβαλήσει",
        "thing": "το κόκκινο βιβλίο|ένα ζεστό παλτό|τον παλιό χάρτη|φρέσκο ψωμί|ένα μικρό δώρο"
        "|το μεγάλο γράμμα"
        "|δύο εισιτήρια|την πράσινη τσάντα|ένα φλιτζάνι τσάι|το χαλασμένο ρολόι|μερικά μήλα|το μπλε ποδήλατο"
        "|ένα καινούριο κλειδί|το βαρύ κουτί|φτηνά λουλούδια|τη φωτογραφική μηχανή",
        "place": "στον κήπο|στον σταθμό|κοντά στο ποτάμι|στην κουζίνα|στο σχολείο|πίσω από την εκκλησία"
        "|στην αγορά"
        "|πάνω στη γέφυρα|στο γραφείο|στη βιβλιοθήκη|δίπλα στη θάλασσα|στο χωριό",
        "time": "σήμερα|κάθε πρωί|μετά το φαγητό|την Κυριακή|το βράδυ|πριν από τη δουλειά|αυτή την εβδομάδα"
        "|τη νύχτα"
        "|τον χειμώνα|μία φορά τον μήνα",
        "comp": "με τον γιο του|με έναν φίλο|με τα παιδιά|χωρίς βοήθεια|με την ομάδα μας|με την αδελφή της"
        "|με τους καλεσμένους",
        "adj": "κρύο|όμορφο|ακριβό|ήσυχο|επικίνδυνο|παράξενο|υπέροχο|βαρετό|δύσκολο|άδειο",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    {who} θέλει να {inf} {thing} {time}.
    νομίζω ότι {who} {verb} {thing} {time}.
    γιατί {who} {verb} {thing} {place};
    {who} δεν μπορεί να {inf} {thing} {comp}.
    όλα είναι πολύ {adj} {place} {time}, λένε.
    εμείς ξέρουμε ότι {who} μένει {place}.
    θέλεις να δεις {thing} {comp} {time};
    αν βρέξει, {who} θα {inf} {thing}.
    {who} {verb} {thing}, γιατί είναι {adj}.
    υπάρχει {thing} {place}, αλλά {who} δεν είναι εδώ.
    σε παρακαλώ, μην αφήνεις {thing} {place}.
    {who} είπε ότι ήταν {adj} να μένει {place}.
    """,
    "ο η το τον την τη του της τα και να δεν είναι στον στην στο στη ότι γιατί με χωρίς θα αν αλλά πολύ όλα"
    " ένα ένας μου μας"
    " μην από κάθε μετά πριν σε είπε ήταν θέλει εδώ υπάρχει κοντά",
)

CHINESE = _language(
    "Chinese",
    {
        "who": "老师|我的哥哥|我们的邻居|老医生|年轻的农民|公共汽车司机|她的叔叔|新来的厨师|我最好的朋友"
        "|小女孩|画家|他的奶奶|疲倦的护士|他们的表弟",
        "verb": "买了|找到了|忘记了|带来了|描述了|需要|画了|藏了|拿走了|卖了|搬了|想要",
        "inf": "买|找|忘记|带走|描述|画|藏|借|卖|搬",
        "thing": "红色的书|一件暖和的大衣|旧地图|新鲜的面包|一份小礼物|那封长信|两张票|绿色的包"
        "|一杯茶|坏了的钟|一些苹果|蓝色的自行车|一把新钥匙|沉重的箱子|便宜的花|照相机",
        "place": "在花园里|在火车站|在河边|在厨房里|在学校|在教堂后面|在市场上|在桥上|在办公室"
        "|在图书馆|在海边|在村子里",
        "time": "今天|每天早上|晚饭以后|星期天|晚上|上班以前|这个星期|半夜|冬天|每个月一次",
        "comp": "和他的儿子|和一个朋友|和孩子们|和我们的队员|和他的妹妹|和客人们|和老同学",
        "adj": "冷|漂亮|贵|安静|危险|奇怪|热闹|无聊|困难|干净",
    },
    """
    {who}{place}{verb}{thing}。
    {time}{who}{place}{verb}{thing}。
    {who}{time}想{inf}{thing}。
    我觉得{who}{time}{verb}{thing}。
    {who}为什么{place}{inf}{thing}？
    {who}没有{comp}一起{inf}{thing}。
    {time}{place}的人都觉得很{adj}。
    我们{place}看见了{who}{comp}。
    你可以{comp}{inf}{thing}吗？
    如果下雨，{who}就要{inf}{thing}。
    {who}{verb}{thing}，因为{place}很{adj}。
    {place}有{thing}，但是{who}不知道。
    请不要{time}{place}{inf}{thing}。
    {who}说{place}的时候非常{adj}。
    """,
    "的 了 在 我 们 和 很 不 是 一 吗 因为 如果 但是 为什么 没有 可以 这 有 都 就 请 说 非常 觉得",
)

LANGUAGES: dict[str, Language] = {
    "ar": ARABIC,
    "de": GERMAN,
    "el": GREEK,
    "en": ENGLISH,
    "es": SPANISH,
    "fr": FRENCH,
    "hi": HINDI,
    "ru": RUSSIAN,
    "tr": TURKISH,
    "ur": URDU,
    "vi": VIETNAMESE,
    "zh": CHINESE,
}

# Languages outside the list: their sentences are labelled `ot`. Small lists: they only have to be told apart.
ITALIAN = _language(
    "Italian",
    {
        "who": "il maestro|mio fratello|il nostro vicino|la dottoressa|uno studente|mia nonna"
        "|il giovane pittore|lo zio",
        "verb": "compra|trova|dimentica|porta|cerca|vende|disegna|guarda",
        "thing": "il libro rosso|un cappotto|gli occhiali|due biglietti|una tazza di tè|le mele"
        "|il pane fresco|la chiave",
        "place": "nel giardino|alla stazione|vicino al fiume|nella cucina|a scuola|sul ponte|in ufficio|nel villaggio",
        "time": "oggi|ogni mattina|dopo cena|di domenica|questa settimana|la sera|d'inverno|stanotte",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    perché {who} non {verb} più {thing}?
    credo che anche {who} sia {place} {time}.
    c'è {thing} {place}, ma {who} non lo sa.
    """,
)
DUTCH = _language(
    "Dutch",
    {
        "who": "de leraar|mijn broer|onze buurman|de oude dokter|een jonge boer|zijn oma|de schilder|haar oom",
        "verb": "koopt|vindt|vergeet|brengt|zoekt|verkoopt|tekent|verbergt",
        "thing": "het rode boek|een warme jas|de oude kaart|vers brood|twee kaartjes|een kopje thee|de fiets|bloemen",
        "place": "in de tuin|op het station|bij de rivier|in de keuken|op school|op de brug|op kantoor|in het dorp",
        "time": "vandaag|elke ochtend|na het eten|op zondag|deze week|'s avonds|in de winter|vannacht",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {verb} {who} {thing} {place}.
    waarom {verb} {who} {thing} niet?
    ik denk dat {who} {thing} {place} {verb}.
    er is {thing} {place}, maar {who} weet het niet.
    """,
)
POLISH = _language(
    "Polish",
    {
        "who": "nauczyciel|mój brat|nasz sąsiad|stary lekarz|młody rolnik|jego babcia|malarz|jej wujek",
        "verb": "kupuje|znajduje|zapomina|przynosi|szuka|sprzedaje|rysuje|chowa",
        "thing": "czerwoną książkę|ciepły płaszcz|starą mapę|świeży chleb|dwa bilety|filiżankę herbaty|rower|kwiaty",
        "place": "w ogrodzie|na dworcu|koło rzeki|w kuchni|w szkole|na moście|w biurze|na wsi",
        "time": "dzisiaj|każdego ranka|po kolacji|w niedzielę|w tym tygodniu|wieczorem|zimą|w nocy",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    dlaczego {who} nie {verb} {thing}?
    myślę, że {who} {verb} {thing} {time}.
    {who} jest {place}, ale {thing} nie widać.
    """,
)
SWAHILI = _language(
    "Swahili",
    {
        "who": "mwalimu|kaka yangu|jirani yetu|daktari mzee|mkulima kijana|bibi yake|mchoraji|mjomba wake",
        "verb": "ananunua|anapata|anasahau|analeta|anatafuta|anauza|anachora|anaficha",
        "thing": "kitabu chekundu|koti jipya|ramani ya zamani|mkate|tiketi mbili|kikombe cha chai|baiskeli|maua",
        "place": "bustanini|kituoni|karibu na mto|jikoni|shuleni|darajani|ofisini|kijijini",
        "time": "leo|kila asubuhi|baada ya chakula|siku ya jumapili|wiki hii|jioni|usiku|mwezi huu",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    kwa nini {who} {verb} {thing}?
    nadhani {who} {verb} {thing} {time}.
    kuna {thing} {place}, lakini {who} hajui.
    """,
)
HEBREW = _language(
    "Hebrew",
    {
        "who": "המורה|אחי|השכן שלנו|הרופא|החקלאי הצעיר|סבא שלו|הצייר|הדוד שלה",
        "verb": "קונה|מוצא|שוכח|מביא|מחפש|מוכר|מצייר|מסתיר",
        "thing": "את הספר האדום|מעיל חם|את המפה הישנה|לחם טרי|שני כרטיסים|כוס תה|את האופניים|פרחים",
        "place": "בגינה|בתחנה|ליד הנהר|במטבח|בבית הספר|על הגשר|במשרד|בכפר",
        "time": "היום|כל בוקר|אחרי האוכל|ביום ראשון|השבוע|בערב|בחורף|בלילה",
    },
    """
    {who} {verb} {thing} {place}.
    {time} {who} {verb} {thing} {place}.
    למה {who} {verb} {thing} {place}?
    אני חושב ש{who} {verb} {thing} {time}.
    """,
)
THAI = _language(
    "Thai",
    {
        "who": "ครู|พี่ชายของฉัน|เพื่อนบ้าน|หมอ|ชาวนา|คุณยาย|จิตรกร|ลุงของเธอ",
        "verb": "ซื้อ|พบ|ลืม|นำ|หา|ขาย|วาด|ซ่อน",
        "thing": "หนังสือสีแดง|เสื้อโค้ท|แผนที่เก่า|ขนมปัง|ตั๋วสองใบ|ชาหนึ่งถ้วย|จักรยาน|ดอกไม้",
        "place": "ในสวน|ที่สถานี|ใกล้แม่น้ำ|ในครัว|ที่โรงเรียน|บนสะพาน|ที่สำนักงาน|ในหมู่บ้าน",
        "time": "วันนี้|ทุกเช้า|หลังอาหารเย็น|วันอาทิตย์|สัปดาห์นี้|ตอนเย็น|ในฤดูหนาว|ตอนกลางคืน",
    },
    """
    {who}{verb}{thing}{place}
    {time}{who}{verb}{thing}{place}
    ทำไม{who}ไม่{verb}{thing}{place}
    ฉันคิดว่า{who}{verb}{thing}{time}
    """,
)
JAPANESE = _language(
    "Japanese",
    {
        "who": "先生は|兄は|隣の人は|お医者さんは|農家の人は|おばあさんは|画家は|おじさんは",
        "verb": "買います|見つけます|忘れます|持ってきます|探します|売ります|描きます|隠します",
        "thing": "赤い本を|暖かいコートを|古い地図を|パンを|切符を二枚|お茶を|自転車を|花を",
        "place": "庭で|駅で|川の近くで|台所で|学校で|橋の上で|会社で|村で",
        "time": "今日|毎朝|夕食の後で|日曜日に|今週|夕方に|冬に|夜に",
    },
    """
    {who}{place}{thing}{verb}。
    {time}{who}{place}{thing}{verb}。
    どうして{who}{thing}{verb}か。
    {who}{time}{thing}{verb}と思います。
    """,
)
KOREAN = _language(
    "Korean",
    {
        "who": "선생님은|우리 형은|이웃 사람은|의사는|젊은 농부는|할머니는|화가는|삼촌은",
        "verb": "삽니다|찾습니다|잊습니다|가져옵니다|팝니다|그립니다|숨깁니다|봅니다",
        "thing": "빨간 책을|따뜻한 외투를|오래된 지도를|빵을|표 두 장을|차 한 잔을|자전거를|꽃을",
        "place": "정원에서|역에서|강가에서|부엌에서|학교에서|다리 위에서|사무실에서|마을에서",
        "time": "오늘|매일 아침|저녁 식사 후에|일요일에|이번 주에|저녁에|겨울에|밤에",
    },
    """
    {who} {place} {thing} {verb}.
    {time} {who} {place} {thing} {verb}.
    왜 {who} {thing} {verb}?
    제 생각에 {who} {time} {thing} {verb}.
    """,
)

OTHER_LANGUAGES: tuple[Language, ...] = (ITALIAN, DUTCH, POLISH, SWAHILI, HEBREW, THAI, JAPANESE, KOREAN)
