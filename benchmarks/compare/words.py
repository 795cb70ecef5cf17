"""What are the corpus' texts made of? Plain words, so that a tokenizer meets nothing unusual."""

from __future__ import annotations

from typing import Final

_ENGLISH: Final = """
the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were her all she there would their we him been has when who will more
no if out so said what up its about into than them can only other new some could time these two
may then do first any my now such like our over man me even most made after also did many before
must through back years where much your way well down should because each just those people
state how too little good world make very year still see work between life being under never day
same another know while last might us great old off come since against go came right used take
three water system report order market record supplier contract invoice shipment warehouse
customer account payment balance interest agreement schedule measurement temperature pressure
voltage signal network protocol database index query document library catalogue chapter section
paragraph reference evidence argument theory experiment observation laboratory population
species river mountain valley harbour village station railway engine bridge tunnel factory
machine metal copper silver timber stone glass paper cotton weather season winter summer
rainfall harvest village council election minister parliament committee decision regulation
application permission hospital treatment patient medicine surgery diagnosis recovery insurance
certificate teacher student lecture examination university research publication journal editor
author translation language grammar dialect alphabet sentence history century empire monument
museum painting sculpture orchestra symphony theatre rehearsal performance audience photograph
television football tournament championship referee bicycle journey passenger luggage airport
departure quarterly consolidated approximately nevertheless furthermore respectively
significantly subsequently particularly predominantly infrastructure administration
communication development
"""
ENGLISH: Final = tuple(_ENGLISH.split())
CHINESE: Final = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种"
    "面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本"
    "去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比"
)
JAPANESE: Final = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん日本語東京"
    "会社電車時間問題研究結果情報技術開発世界経済政府発表カタログデータベースサーバーテスト"
)
KOREAN: Final = (
    "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지"
    "한국어문서정보기술연구결과시간문제세계경제정부발표회사서울"
)
EMOJI: Final = (
    *"😀😂🥰😎🤔😭🙏👍🎉🔥💡🚀🌍📈📦🧪🐍🍀🎵⚽🏔🚲✈⏰",
    "👩‍💻",
    "👨‍👩‍👧",
    "🏳️‍🌈",
    "👍🏽",
    "🇫🇷",
    "🇯🇵",
)
NOUNS: Final = ("row", "batch", "vector", "token", "window", "limit", "record", "page", "stream")
VERBS: Final = ("load", "merge", "parse", "write", "check", "split", "update", "collect", "encode")
