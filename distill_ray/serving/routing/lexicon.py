"""Words that turn a request round: negation, opposite poles, numbers spelt out. Data for `features.py`.

Written for this project; common words of a dozen languages, each form that is frequent in requests. A stem (`enabl*`)
stands for all words that begin with it. Of words that mean something else as well ("one", "right", "may") those are
left out whose other meaning is more frequent.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English, German, French, Spanish, Portuguese, Italian, Dutch, Scandinavian, Polish, Russian, Ukrainian, Turkish,
# Arabic, Hebrew, Hindi, Indonesian. Of French "ne ... pas" both count, in both texts alike.
NEGATIONS = _words(
    """
    not no never none nobody nothing nowhere neither nor without cannot dont doesnt didnt isnt arent wasnt cant wont
    nicht kein keine keinen keinem keiner keines nie niemals niemand nichts nirgends ohne weder
    ne pas jamais sans aucun aucune rien personne ni
    nunca jamás nada nadie ningún ninguna ninguno sin tampoco
    não nem sem nenhum nenhuma ninguém
    non mai senza nessun nessuno nessuna niente nulla né
    niet geen nooit niemand niets zonder
    inte ingen inget inga aldrig utan ikke aldri uten uden intet
    nie bez nigdy żaden żadna nikt nic
    не нет без никогда никто ничего нельзя ни ні немає ніколи
    değil yok hiç asla olmadan hayır
    لا لم لن ليس ليست بدون ما
    לא אין בלי אף
    नहीं मत बिना न
    tidak bukan jangan tanpa belum
    """
)
UNSPACED_NEGATION = re.compile(r"[不没沒無无未非勿莫]|别(?!的)|ない|ません|なく|ぬき|않|못|없|(?<!\w)안(?!\w)|아니")

NEGATIVE_PREFIXES = (
    "un", "in", "im", "il", "ir", "dis", "non", "anti", "de", "mis", "des", "dés", "dé", "an", "on", "ont", "s",
    "не", "без", "bes", "nie", "o", "u", "in-", "non-", "mal",
)  # fmt: skip

_NUMBER_TEXT = """
0 zero null zéro cero nul ноль ноля
2 two zwei deux dos due dois duas twee två to dwa два две
3 three drei trois tres tre três drie trzy три
4 four vier quatre cuatro quattro quatro fyra fire cztery четыре
5 five fünf cinq cinco cinque vijf fem pięć пять
6 six sechs seis sei zes sex seks sześć шесть
7 seven sieben sept siete sette sete zeven sju syv siedem семь
8 eight acht huit ocho otto oito åtta åtte otte osiem восемь
9 nine neun neuf nueve nove negen nio ni dziewięć девять
10 ten zehn dix diez dieci dez tien tio ti dziesięć десять
11 eleven elf onze once undici
12 twelve zwölf douze doce dodici doze twaalf
13 thirteen dreizehn treize trece tredici
14 fourteen vierzehn quatorze catorce quattordici
15 fifteen fünfzehn quinze quince quindici
16 sixteen sechzehn seize dieciséis
17 seventeen siebzehn
18 eighteen achtzehn
19 nineteen neunzehn
20 twenty zwanzig vingt veinte venti vinte twintig
30 thirty dreißig trente treinta trenta trinta dertig
40 forty vierzig quarante cuarenta quaranta quarenta
50 fifty fünfzig cinquante cincuenta cinquanta cinquenta
60 sixty sechzig soixante sesenta sessanta
70 seventy siebzig setenta settanta
80 eighty achtzig ochenta ottanta
90 ninety neunzig noventa novanta
100 hundred hundert cent cien cento honderd сто
1000 thousand tausend mille mil duizend тысяча
1000000 million millionen millón milione
1000000000 billion milliarde milliard
1/2 half halb moitié mitad metà meia
*2 twice double doppelt zweimal
*3 triple thrice dreimal
#1 first erste ersten erster premier première primero primera primo prima первый
#2 second zweite zweiten deuxième segundo segunda secondo seconda второй
#3 third dritte dritten troisième tercero tercera terzo третий
#4 fourth vierte
#5 fifth fünfte
#-1 last letzte letzten dernier dernière último última ultimo последний
#-2 penultimate vorletzte
"""
NUMBER_WORDS = {
    word: value
    for value, *words in (line.split() for line in _NUMBER_TEXT.strip().splitlines())
    for word in words
    if word not in ("ti", "ni", "to", "due", "once", "sei", "sex")  # other words of other languages
}

# axis: words of one side | words of the other. A star makes a stem.
_AXES_TEXT = """
switch: enabl* activat* aktivier* einschalt* eingeschaltet activ* habilit* attiv* inschakel* включ* aktyw*
  | disabl* deactivat* deaktivier* ausschalt* ausgeschaltet désactiv* desactiv* desativ* deshabilit* disattiv*
    uitschakel* выключ* отключ* wyłącz*
on: on
  | off aus
open: open opens opened opening öffne* geöffnet* offen ouvr* ouvert* abrir abre abiert* aberto apri* aperto откр* otw*
    åpne* öppn*
  | close closes closed closing schließ* geschlossen* ferm* cerrar cierr* cerrad* fechar fechad* chiud* chius*
    закр* zamk* lukk* stäng*
rise: increas* rais* rise rises rising rose grow* grew higher augment* croît* erhöh* steig* aument* subir sube*
    вырос* увелич* zwiększ* verhog* upgrad* gain* expand*
  | decreas* lower* reduc* fall falls falling fell drop* shrink* diminu* baiss* senk* sink* verringer* disminu*
    baj* diminui* умень* снизи* zmniejsz* verlag* downgrad* los* cut
before: before vor vorher avant antes prima перед до przed voor föra* earlier früher prior
  | after nach nachher après después depois dopo после po na efter etter later später
more: more most mehr meist* plus más mais più больше более więcej meer mer mest
  | less fewer least weniger wenigst* moins menos meno меньше менее mniej minder mindre
max: maxim* highest höchst* greatest largest biggest größt* longest längst* максим* most
  | minim* lowest niedrigst* smallest kleinst* shortest kürzest* миним* least
big: big bigger large larger groß* größer* grand* gran grande* больш* duży duż* stor stora
  | small smaller little klein* petit* pequeñ* pequen* piccol* мален* mał* liten små
hot: hot hotter warm* heiß* chaud* calient* quente* cald* горяч* тепл* gorąc* varm*
  | cold colder cool* kalt* froid* fri* freddo fredda холод* zimn* kald* kall*
start: start* begin* began begun anfang* beginn* commenc* empez* empiez* comenz* começ* comincia* inizi* нача*
    rozpocz* launch* resum*
  | stop* end ends ended ending finish* beend* aufhör* arrêt* termin* parar para detener acab* ferma* останов*
    законч* zakończ* paus*
add: add adds added adding hinzufüg* ajout* añad* agreg* adicion* aggiung* добав* doda* insert* include*
    including
  | remov* delet* subtract* entfern* lösch* supprim* enlev* elimin* quit* borr* remover rimuov* удал* usuń*
    usun* exclud* without
allow: allow* permit* erlaub* gestatt* autoris* permet* permett* разреш* pozwal* legal* let
  | forbid* forbidden prohibit* deny denie* block* verbiet* verboten interdi* prohíb* proib* viet* запре*
    zabran* ban banned refus*
accept: accept* akzeptier* annehm* approv* genehmig* aprob* aprov* approuv* принят* прим* akcept*
  | reject* ablehn* declin* rechaz* rejeit* rifiut* rejet* откло* odrzuc*
buy: buy* bought purchas* kauf* achet* acheter compr* купи* kupi* koop*
  | sell* sold verkauf* vend* прода* sprzeda* verkoop*
win: win wins winning won gewinn* gagn* ganar gana* vencer vinc* выигр* wygra*
  | lose loses losing lost verlier* verlor* perd* pierd* проигр* przegra*
good: good better best gut gute* guten besser* beste* bon bonne* meilleur* buen* mejor* bom boa melhor* buon*
    migliore хорош* лучш* dobr* advantage* benefit* pros vorteil* avantag* ventaj*
  | bad worse worst schlecht* schlimm* mauvais* pire* mal malo mala peor* mau ruim pior* cattiv* peggio* плох*
    худш* zł* disadvantage* drawback* cons nachteil* désavantag* inconvén* desventaj*
true: true correct* right wahr richtig* vrai* verdad* vero верн* правильн*
  | false wrong incorrect* falsch* faux fausse* fals* неверн* неправильн* błędn*
yes: yes ja oui sí sim sì да tak
  | no nein non
like: like* love* loved mag liebe* aime* gust* adora* люблю любит
  | dislike* hate* hasse* déteste* odia* odeio ненави*
left: left links gauche izquierd* esquerd* sinistr* лев* лево lewo
  | right rechts droite derech* direit* destr* прав* право prawo
up: up upwards above over upstairs oben hinauf haut arriba cima sopra вверх góra
  | down downwards below under underneath downstairs unten hinunter bas abajo baixo sotto вниз dół
in: inside indoor* innerhalb dedans dentro внутри wewnątrz into incoming inbound import* arriv* ankunft llegada*
    enter*
  | outside outdoor* außerhalb dehors fuera fora fuori снаружи zewnątrz outgoing outbound export* depart*
    abfahrt salida* leav* left exit*
from: from von desde из od
  | to nach zu hacia para до
first: first erst* primer* prim* premier* первый
  | last letzt* último* ultim* dernier* последний
push: push* send* sent upload* give gives gave given pay* lend* schick* envoy* envi* дай отправ* deposit*
    encrypt* compress* encod* lock* mount* connect* subscrib* login attach* encourag* follow* accelerat*
  | pull* receiv* download* take takes took taken borrow* empfang* erhalt* reçoi* recib* receb* получ* withdraw*
    decrypt* decompress* decod* unlock* unmount* disconnect* unsubscrib* logout detach* discourag* unfollow*
    decelerat*
all: all every everyone everybody always alle jeder jede immer tous toutes toujours todos todas siempre sempre
    tutti все всегда wszystkie zawsze
  | some any sometimes few einige manche manchmal quelques parfois alguno* algun* qualche некоторые иногда
    czasem rarely seldom hardly
only: only nur seulement seul* solo sólo solamente apenas soltanto только tylko
  | also auch aussi también também anche также też
day: day daytime tag jour día dia giorno день
  | night nacht nuit noche noite notte ночь
morning: morning morgens matin mañana manhã mattina утро утром
  | evening abends soir tarde noite sera вечер вечером
early: early früh tôt temprano cedo presto рано
  | late spät tard tarde поздно
fast: fast faster fastest quick* schnell* rapid* vite rápid* veloc* быстр* szybk*
  | slow* langsam* lent* медлен* woln*
high: high hoch hohe* haut* alto alta высок* wysok*
  | low niedrig* bas basse* bajo baja baixo basso низк* nisk*
long: long longer lang* länger* longue* largo* larga* lungo длин* dług*
  | short* kurz* kürzer* court* corto* breve* коротк* krótk*
old: old older oldest alt alte* vieux vieille viej* velh* vecchi* стар* star*
  | new newer newest young* neu neue* jung* nouveau nouvelle jeune* nuev* joven* nov* giovan* нов* молод* now*
rich: rich reich riche* rico rica ricco богат*
  | poor arm arme* pauvre* pobre* pover* бедн*
safe: safe safely secure* sicher* sûr* segur* sicur* безопасн*
  | danger* unsafe risky gefährl* dangereu* peligros* perigos* pericolos* опасн*
easy: easy easier simple leicht* einfach* facile* fácil* лег* прост*
  | hard harder difficult* schwer* schwierig* difficile* difícil* труд* слож*
full: full voll* plein* lleno* cheio pieno полн*
  | empty leer* vide* vací* vazi* vuot* пуст*
alive: alive living lebend* vivant* vivo* жив*
  | dead deceased tot tote* mort* muert* morto мертв*
public: public* öffentlich* públic* pubblic* публичн* открыт*
  | private* privat* privé* privad* частн* закрыт*
male: he him his man men male boy father son brother husband king mann
  | she her hers woman women female girl mother daughter sister wife queen frau
income: income revenue profit* credit* asset* einnahm* gewinn recett* ingres* entrate доход*
  | expense* cost* loss debit* liabilit* ausgab* verlust dépens* gast* spese расход*
"""


Poles = dict[str, tuple[tuple[str, str], ...]]


def _poles() -> tuple[Poles, Poles]:
    words: Poles = {}
    stems: Poles = {}
    for block in re.split(r"\n(?=\w+:)", _AXES_TEXT.strip()):
        axis, _, sides = block.partition(":")
        for side, text in zip("+-", sides.split("|"), strict=True):
            for word in text.split():
                target = stems if word.endswith("*") else words
                target[word.rstrip("*")] = (*target.get(word.rstrip("*"), ()), (axis, side))
    return words, stems


AXES, AXIS_STEMS = _poles()
"""A word, or the stem of words -> where it stands: (axis, side). "right" is neither left nor wrong."""

UNSPACED_AXES = tuple(
    (re.compile(pattern), axis, side)
    for axis, plus, minus in (
        ("switch", "启用|啟用|打开|打開|开启|有効|オンに|켜", "禁用|停用|关闭|關閉|无效|無効|オフに|끄"),
        ("rise", "增加|提高|上升|増や|上げ|늘리|높이", "减少|減少|降低|下降|減ら|下げ|줄이|낮추"),
        ("before", "之前|以前|前に|전에", "之后|之後|以后|後に|후에"),
        ("more", "更多|最多|もっと多|더 많", "更少|最少|もっと少|더 적"),
        ("big", "最大|更大|大きい|크", "最小|更小|小さい|작"),
        ("add", "添加|新增|追加|추가", "删除|刪除|移除|削除|삭제|제거"),
        ("allow", "允许|允許|許可|허용", "禁止|금지"),
        ("buy", "购买|購買|买|買|사고|구매", "出售|卖|賣|売|팔|판매"),
        ("good", "优点|優點|最好|長所|장점", "缺点|缺點|最差|短所|단점"),
        ("start", "开始|開始|시작", "结束|停止|終了|종료|중지"),
        ("left", "左|왼쪽", "右|오른쪽"),
        ("up", "上面|以上|위", "下面|以下|아래"),
        ("hot", "热|暑|더운|뜨거", "冷|寒|추운|차가"),
    )
    for side, pattern in (("+", plus), ("-", minus))
)

# What sentences begin with: a capital there says nothing.
STARTERS = _words(
    """
    a about according after all also although an and any are as ask at based be because before briefly but by
    calculate can change check classify compare complete compose compute consider convert correct could count
    create decide define delete describe design detect determine did do does draft edit enable disable evaluate
    every explain extract fill find fix for from generate get give given has have he hello help hey hi how
    however i identify if implement in include increase decrease reduce is it let list look make may me my name
    never no not now of off on once one open close or our paraphrase please predict prove provide rate read
    recommend remove rename rephrase replace reply respond return review rewrite say schedule select send set
    she should show simplify sing solve some sort speak start state stop suggest summarise summarize tell thanks
    that the their then there these they think this those to transform translate try turn under update use using
    verify was we were what what's when where which while who whom whose why will with without would write yes
    you your add always book cancel buy sell allow block accept reject lock unlock mute unmute aber als am auf
    aus bei bitte das dass dein dem den der des die du ein eine einen erkläre er es für gib hallo hat ich ihr im
    ist kann kannst können mein mit nach nenne ob oder schreibe sie sind so und über um von wann warum welche
    welcher welches wenn wer wie wieviel wir wo zu zum übersetze au aux avec bonjour ce ces cette comment
    combien dans de donne dont elle en est et il ils je la le les leur ma mais mon ne nous où ou par peux pour
    pourquoi quand que quel quelle quels quelles qui quoi sa si son sur traduis tu un une vous votre écris
    explique al con cómo como cuál cuáles cuándo cuánto cuántos del dónde donde el ella ellos escribe eso esta
    este esto hola las lo los mi mis para pero por porque puede puedes qué quién se sin sobre su sus te traduce
    una unos y yo ai che chi ci come cosa dal dei della di dove e gli ho io nel non per perché più quale quali
    quando quanto questo sei sono ti traduci tra uno ao com da dos ele ela em esse essa está eu isso mas meu
    minha na não o os pela pelo qual quais quem são seu sua tem uma você een het hij hoe ik kan maar met mijn
    naar om op van voor waar waarom wanneer wat welke wij ze в вы где для до если есть и из или как какая какие
    какой когда кто мне мой мы на не но о объясни он она они от пожалуйста по почему при с сколько так ты у что
    это я переведи напиши co czy dla gdzie ile jak jaki jaka kiedy kto mój nie od po proszę w z za że
    """
)
