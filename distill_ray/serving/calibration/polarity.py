"""Requests of similar words and another meaning: where one was trained on, the other must not pass for it.

Written for this project. `calibrate` counts how many cross, and the tests hold the guard against them. A line is
kind | trained | asked; kinds are what differs: numbers, names, negation (a "not", or the opposite word).
"""

from __future__ import annotations

from typing import NamedTuple


class PolarityPair(NamedTuple):
    """Two requests that want different answers."""

    kind: str
    trained: str
    asked: str


_TEXT = """
negation | How do I enable two-factor authentication? | How do I disable two-factor authentication?
negation | Enable dark mode in the settings | Disable dark mode in the settings
negation | Activate the spam filter for my mailbox | Deactivate the spam filter for my mailbox
negation | Turn the heating on in the living room | Turn the heating off in the living room
negation | Increase the font size of the title | Decrease the font size of the title
negation | Raise the temperature by a few degrees | Lower the temperature by a few degrees
negation | Why did the share price rise after the report? | Why did the share price fall after the report?
negation | List foods that increase blood pressure | List foods that lower blood pressure
negation | What should I eat before a marathon? | What should I eat after a marathon?
negation | Take the tablet before meals | Take the tablet after meals
negation | Which countries joined before the treaty was signed? | Which countries joined after the treaty was signed?
negation | Show me hotels that allow dogs | Show me hotels that do not allow dogs
negation | Is it allowed to park here at night? | Is it forbidden to park here at night?
negation | Write a mail that accepts the offer | Write a mail that rejects the offer
negation | Draft a letter approving the request for leave | Draft a letter declining the request for leave
negation | Give me three reasons to buy the house | Give me three reasons to sell the house
negation | When is the best time to buy dollars? | When is the best time to sell dollars?
negation | What are the advantages of remote work? | What are the disadvantages of remote work?
negation | Summarise the benefits of the vaccine | Summarise the drawbacks of the vaccine
negation | Is this statement true according to the text? | Is this statement false according to the text?
negation | Find the correct answers in the list | Find the wrong answers in the list
negation | Translate the sentence into formal English | Translate the sentence into informal English
negation | Is it legal to record a phone call? | Is it illegal to record a phone call?
negation | Which of these numbers are even? | Which of these numbers are not even?
negation | Does the soup contain nuts? | Does the soup not contain nuts?
negation | The patient has a history of asthma | The patient has no history of asthma
negation | The patient reports chest pain | The patient denies chest pain
negation | Can I take this medicine with alcohol? | Can I take this medicine without alcohol?
negation | Recipes with gluten for beginners | Recipes without gluten for beginners
negation | The device is compatible with the old charger | The device is incompatible with the old charger
negation | Explain why the experiment was successful | Explain why the experiment was unsuccessful
negation | She was happy with the result of the exam | She was unhappy with the result of the exam
negation | Is it possible to change the booking? | Is it impossible to change the booking?
negation | Was the driver responsible for the accident? | Was the driver not responsible for the accident?
negation | The contract was renewed by the client | The contract was never renewed by the client
negation | Everybody agreed with the proposal | Nobody agreed with the proposal
negation | All of the students passed the test | None of the students passed the test
negation | Always lock the door when you leave | Never lock the door when you leave
negation | Add the column to the table | Remove the column from the table
negation | Add me to the mailing list | Remove me from the mailing list
negation | Insert a row above the header | Delete a row above the header
negation | Start the backup service on the server | Stop the backup service on the server
negation | When does the school year begin? | When does the school year end?
negation | Open the valve of the gas tank | Close the valve of the gas tank
negation | Is the museum open on Sunday? | Is the museum closed on Sunday?
negation | Lock the account of this user | Unlock the account of this user
negation | Encrypt the file with the key | Decrypt the file with the key
negation | Compress the folder on the desktop | Decompress the folder on the desktop
negation | Mount the disk on the server | Unmount the disk on the server
negation | Connect the printer to the network | Disconnect the printer from the network
negation | Subscribe me to the newsletter | Unsubscribe me from the newsletter
negation | Follow the account on the platform | Unfollow the account on the platform
negation | Upload the report to the cloud | Download the report to the cloud
negation | Import the contacts of the phone | Export the contacts of the phone
negation | Send money to my landlord | Receive money from my landlord
negation | How much can I deposit per day? | How much can I withdraw per day?
negation | List the largest cities of the region | List the smallest cities of the region
negation | What is the highest temperature on record? | What is the lowest temperature on record?
negation | Find the maximum of the function | Find the minimum of the function
negation | What is the fastest way to the airport? | What is the slowest way to the airport?
negation | Name the oldest university in the country | Name the newest university in the country
negation | Which plan is cheaper and has more storage? | Which plan is cheaper and has less storage?
negation | The company made a profit this year | The company made a loss this year
negation | Did the home team win the match? | Did the home team lose the match?
negation | Write a positive review of the restaurant with good words | Write a review of the restaurant with bad words
negation | Turn left at the station | Turn right at the station
negation | Is the shop upstairs? | Is the shop downstairs?
negation | Bring the dog inside the house | Bring the dog outside the house
negation | Trains from the capital to the coast | Trains to the capital from the coast
negation | Arrivals at the airport this evening | Departures at the airport this evening
negation | A good morning greeting for my boss | A good evening greeting for my boss
negation | Is the water hot enough? | Is the water cold enough?
negation | Is the tank full? | Is the tank empty?
negation | Is this road safe in winter? | Is this road dangerous in winter?
negation | Give me an easy puzzle | Give me a difficult puzzle
negation | Make the text longer | Make the text shorter
negation | Explain it with a long example | Explain it with a short example
negation | Is the singer still alive? | Is the singer already dead?
negation | Make the repository public | Make the repository private
negation | What do people like about the phone? | What do people dislike about the phone?
negation | The treatment is useful for children | The treatment is useless for children
negation | The new drug is harmful to the liver | The new drug is harmless to the liver
negation | Do you agree with the author? | Do you disagree with the author?
negation | The witness told an honest story | The witness told a dishonest story
negation | The results are significant | The results are insignificant
negation | Is the matrix invertible and its values finite? | Is the matrix invertible and its values infinite?
negation | Aktiviere den Flugmodus | Deaktiviere den Flugmodus
negation | Ist das Geschäft am Montag geöffnet? | Ist das Geschäft am Montag geschlossen?
negation | Ist Parken hier erlaubt? | Ist Parken hier verboten?
negation | Ich möchte den Vertrag kündigen | Ich möchte den Vertrag nicht kündigen
negation | Der Patient hat Fieber | Der Patient hat kein Fieber
negation | Was sind die Vorteile der Methode? | Was sind die Nachteile der Methode?
negation | Nimm die Tablette vor dem Essen | Nimm die Tablette nach dem Essen
negation | Erhöhe die Lautstärke | Verringere die Lautstärke
negation | Ist es möglich, heute zu liefern? | Ist es unmöglich, heute zu liefern?
negation | Comment activer le pare-feu ? | Comment désactiver le pare-feu ?
negation | Le magasin est ouvert le dimanche | Le magasin est fermé le dimanche
negation | Je veux annuler ma commande | Je ne veux pas annuler ma commande
negation | Quels sont les avantages du contrat ? | Quels sont les inconvénients du contrat ?
negation | Que faire avant une opération ? | Que faire après une opération ?
negation | Un plat avec du sucre | Un plat sans sucre
negation | ¿Cómo activar las notificaciones? | ¿Cómo desactivar las notificaciones?
negation | ¿Está abierto el banco hoy? | ¿Está cerrado el banco hoy?
negation | Quiero pagar con tarjeta | No quiero pagar con tarjeta
negation | ¿Qué hago antes del examen? | ¿Qué hago después del examen?
negation | Dame razones para comprar oro | Dame razones para vender oro
negation | Aumenta el brillo de la pantalla | Disminuye el brillo de la pantalla
negation | Come posso attivare il servizio? | Come posso disattivare il servizio?
negation | Il negozio è aperto oggi? | Il negozio è chiuso oggi?
negation | Voglio ricevere la fattura | Non voglio ricevere la fattura
negation | Como ativar o modo escuro? | Como desativar o modo escuro?
negation | Quero cancelar a reserva | Não quero cancelar a reserva
negation | O que fazer antes da viagem? | O que fazer depois da viagem?
negation | Hoe kan ik de melding inschakelen? | Hoe kan ik de melding uitschakelen?
negation | Ik wil de krant ontvangen | Ik wil de krant niet ontvangen
negation | Jag vill ha mjölk i kaffet | Jag vill inte ha mjölk i kaffet
negation | Chcę anulować zamówienie | Nie chcę anulować zamówienia
negation | Как включить уведомления? | Как выключить уведомления?
negation | Магазин открыт в воскресенье? | Магазин закрыт в воскресенье?
negation | Я хочу отменить заказ | Я не хочу отменить заказ
negation | Увеличить громкость | Уменьшить громкость
negation | 如何启用自动更新? | 如何禁用自动更新?
negation | 这个药可以和牛奶一起吃吗? | 这个药不可以和牛奶一起吃吗?
negation | 请增加屏幕亮度 | 请降低屏幕亮度
negation | 饭前吃药还是之前? 在手术之前吃药 | 饭前吃药还是之前? 在手术之后吃药
negation | 这种方法的优点是什么? | 这种方法的缺点是什么?
negation | 通知を有効にする方法 | 通知を無効にする方法
negation | この部屋でタバコを吸えますか、吸ってもいい | この部屋でタバコを吸えますか、吸ってはいけません
negation | 列を追加してください | 列を削除してください
negation | 파일을 추가해 주세요 | 파일을 삭제해 주세요
negation | 나는 커피를 좋아해요 | 나는 커피를 좋아하지 않아요
negation | Siparişi iptal etmek mümkün mü? | Siparişi iptal etmek mümkün değil mi?
negation | أريد إلغاء الطلب | لا أريد إلغاء الطلب
negation | मुझे चाय चाहिए | मुझे चाय नहीं चाहिए
negation | Saya mau makan pedas | Saya tidak mau makan pedas
numbers | Is 30 mg of this drug safe for a child? | Is 300 mg of this drug safe for a child?
numbers | What is 15 percent of 80? | What is 25 percent of 80?
numbers | Convert 5 miles to kilometres | Convert 50 miles to kilometres
numbers | How many days are between 3 May and 9 June? | How many days are between 3 May and 8 June?
numbers | Set an alarm for 7:30 | Set an alarm for 7:15
numbers | What happened in 1914? | What happened in 1941?
numbers | Book a table for two people | Book a table for seven people
numbers | Book a room for three nights | Book a room for four nights
numbers | Split 120 euros among 4 friends | Split 120 euros among 5 friends
numbers | Add 12 and 30 | Add 12 and 31
numbers | Solve x + 4 = 9 | Solve x + 4 = 19
numbers | What is the square root of 144? | What is the square root of 14.4?
numbers | The temperature is 5 degrees, what should I wear? | The temperature is -5 degrees, what should I wear?
numbers | Translate chapter 2 of the book | Translate chapter 12 of the book
numbers | Give me the first result of the list | Give me the third result of the list
numbers | Remind me in 10 minutes | Remind me in 100 minutes
numbers | Transfer 1,000 dollars to savings | Transfer 10,000 dollars to savings
numbers | Which bus goes at 18:05? | Which bus goes at 08:05?
numbers | Explain article 5 of the law | Explain article 15 of the law
numbers | Summarise the text in 50 words | Summarise the text in 500 words
numbers | My account number is 48291, is it active? | My account number is 48219, is it active?
numbers | Invoice 2024-0017 is unpaid | Invoice 2024-0071 is unpaid
numbers | Version 3.1 crashes at start | Version 3.11 crashes at start
numbers | What is the capital gain on 200 shares? | What is the capital gain on 20 shares?
numbers | The child is one year old and weighs 9 kg | The child is one year old and weighs 19 kg
numbers | Convert 3 to binary and 5 to octal | Convert 5 to binary and 3 to octal
numbers | Half of the class was ill, how many is that? | Double of the class was ill, how many is that?
numbers | Bake the bread at 180 degrees for 40 minutes | Bake the bread at 40 degrees for 180 minutes
numbers | Wie viel sind 20 Prozent von 50? | Wie viel sind 30 Prozent von 50?
numbers | Reserviere einen Tisch für vier Personen | Reserviere einen Tisch für acht Personen
numbers | Combien font 12 fois 8 ? | Combien font 12 fois 9 ?
numbers | Une chambre pour deux nuits | Une chambre pour cinq nuits
numbers | ¿Cuánto es 7 por 6? | ¿Cuánto es 7 por 9?
numbers | Una mesa para tres personas | Una mesa para seis personas
numbers | Сколько будет 15 плюс 27? | Сколько будет 15 плюс 72?
numbers | 一共有 25 个学生, 男生有几个? | 一共有 52 个学生, 男生有几个?
numbers | 会議は３時からですか | 会議は５時からですか
numbers | 5 파운드는 몇 킬로그램인가요? | 50 파운드는 몇 킬로그램인가요?
numbers | كم يساوي ٣ زائد ٤؟ | كم يساوي ٣ زائد ٥؟
numbers | १० में से ३ घटाओ | १० में से ५ घटाओ
names | What is the capital of Austria? | What is the capital of Australia?
names | Flights from Boston to Denver | Flights from Denver to Boston
names | Does Alice owe Bob money? | Does Bob owe Alice money?
names | Who was the father of Queen Victoria? | Who was the father of Queen Elizabeth?
names | Translate the sentence into Spanish | Translate the sentence into Swedish
names | Tell me about the life of Marie Curie | Tell me about the life of Pierre Curie
names | How tall is Mount Kenya? | How tall is Mount Everest?
names | Is the office in Paris hiring? | Is the office in Prague hiring?
names | Write a mail to Mr Brown about the delay | Write a mail to Mr Green about the delay
names | Schedule the meeting with Sarah on Monday | Schedule the meeting with Sandra on Monday
names | Schedule the meeting with Sarah on Tuesday | Schedule the meeting with Sarah on Thursday
names | What is the weather in Rome in July? | What is the weather in Rome in June?
names | Did Germany beat Brazil in the final? | Did Brazil beat Germany in the final?
names | Compare Toyota with Honda | Compare Toyota with Hyundai
names | What does the function "open_file" return? | What does the function "close_file" return?
names | Set the variable max_size in the config | Set the variable min_size in the config
names | Install the package numpy==1 with pip3 | Install the package numpy==1 with pip2
names | Why does app/main.py fail to import? | Why does app/model.py fail to import?
names | Send the report to anna@example.com | Send the report to hanna@example.com
names | Explain the error code E4012 | Explain the error code E4021
names | Is gate B12 near the exit? | Is gate B21 near the exit?
names | Call getUserName in the loop | Call getUserEmail in the loop
names | Who sings the song "Yesterday Again"? | Who sings the song "Tomorrow Again"?
names | Who wrote the novel "The Red House"? | Who wrote the novel "The Blue House"?
names | Define the word "affect" | Define the word "effect"
names | Berlin has how many inhabitants? | Bern has how many inhabitants?
names | The Amazon flows through which countries? | The Nile flows through which countries?
names | Is the visa for Niger expensive? | Is the visa for Nigeria expensive?
names | Explain the role of Iran in the treaty | Explain the role of Iraq in the treaty
names | What is the currency of Slovakia? | What is the currency of Slovenia?
names | Wann fährt der Zug nach Köln? | Wann fährt der Zug nach Kiel?
names | Wo wohnt Frau Schmidt? | Wo wohnt Frau Schulz?
names | Où se trouve Lyon ? | Où se trouve Lille ?
names | Qui est le président de la France ? | Qui est le président de la Suisse ?
names | ¿Dónde está Sevilla? | ¿Dónde está Segovia?
names | ¿Quién es el rey de España? | ¿Quién es el rey de Suecia?
names | Где находится Казань? | Где находится Рязань?
names | Поезд из Москвы в Киров | Поезд из Кирова в Москву
names | 「東京」の天気はどうですか | 「京都」の天気はどうですか
names | 请解释“成功”这个词 | 请解释“失败”这个词
"""

PAIRS = tuple(PolarityPair(*(part.strip() for part in line.split(" | "))) for line in _TEXT.strip().splitlines())
