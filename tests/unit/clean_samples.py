"""Real texts in many scripts, as people write them, and records built from texts."""

from __future__ import annotations

from typing import Any

from align.core.types import Conversation, Feedback, Message, Preference

WRITTEN = {
    "Chinese": "你好，我想问一下：这台灯的灯泡包含在内吗？“暖白”和《冷白》都可以（E14）。１２３、ＡＢＣ！",
    "Japanese": "こんにちは、電球は別売りですか？「暖色」がいいです。ﾊﾝｶｸもあります〜　よろしく！葛󠄀城市",
    "Korean": "안녕하세요, 전구가 포함되어 있나요? 감사합니다!",
    "Arabic": "مرحبًا، هل المصباح متضمَّن في العلبة؟ شكرًا جزيلًا، السعر ٢٥ ريالًا.",
    "Arabic with marks": "رقم الطلب هو \u200f١٢٣-٤٥٦\u200f وشكرًا، راجع \u2067الموقع\u2069 والملف C++\u200e.",
    "Persian": "سلام، می‌خواهم بدانم آیا لامپ‌ها درون جعبه هستند؟ کتاب‌های خانه‌مان را نمی‌بینم.",
    "Urdu": "السلام علیکم، کیا بلب ڈبے میں شامل ہے؟ شکریہ۔",
    "Hebrew": "שלום, האם הנורה כלולה? המחיר \u200e25$\u200f ותודה רבה.",
    "Hindi": "नमस्ते, क्या बल्ब डिब्बे में है? क्‍या आप क्षत्रिय लिख सकते हैं? धन्यवाद।",
    "Bengali": "নমস্কার, বাল্ব কি বাক্সে আছে? র‍্যাব আর শ্রী।",
    "Tamil": "வணக்கம், விளக்கு பெட்டியில் உள்ளதா? க்‌ஷ நன்றி.",
    "Sinhala": "ආයුබෝවන්, ශ්‍රී ලංකාවේ බල්බය තියෙනවාද?",
    "Thai": "สวัสดีครับ หลอดไฟ\u200bอยู่ในกล่องหรือไม่ ขอบคุณครับ",
    "Khmer": "សួស្តី\u200bតើ\u200bអំពូល\u200bនៅ\u200bក្នុង\u200bប្រអប់\u200bឬ\u200bទេ",
    "Burmese": "မင်္ဂလာပါ၊ မီးသီးပါလား။",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠌ ᠨᠣᠮ᠎ᠠ",
    "Amharic": "ሰላም፣ አምፖሉ በሳጥኑ ውስጥ አለ?",
    "Russian": "Здравствуйте, лампочка входит в комплект? Спасибо, ещё раз — «тёплый» свет.",
    "Greek": "Γεια σας, περιλαμβάνεται ο λαμπτήρας; Ευχαριστώ!",
    "German": "Grüße aus Köln – „warmweiß“ wäre schön, 25 °C, Straße 3b, 10 €.",
    "French": "Où est l’ampoule ? Ça coûte 25 € « environ », cœur à cœur, n’est-ce pas ?",
    "Vietnamese": "Xin chào, bóng đèn có trong hộp không? Cảm ơn rất nhiều.",
    "Emoji": "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🏴‍☠️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇳🇴 1️⃣ ❤️‍🔥 ☺︎ 🧑🏿‍🤝‍🧑🏻 👁️‍🗨️",
    "Mathematics": "∀ε>0 ∃δ: |x−a|<δ ⇒ |ƒ(x)−ƒ(a)|<ε, ∑ᵢ xᵢ² ≤ ½·10³, 𝔼[𝑋] = ∫ x dμ, A⊗B ≠ ∅",
    "Code": "```python\ndef f(x: int) -> str:\n\treturn f'{x:>8}'  # a @ b, 1.2.3, a::b, <br>\n```\nUse `&amp;`.",
    "Table": "| a | b |\n|---|---|\n| 1 | 2 |\n\n" + 80 * "─",
}


def build_conversation(*lines: str, **rest: Any) -> Conversation:
    """Build a conversation that alternates between user and assistant, and opens with the user."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(lines)), **rest)


def build_conversation_by_role(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns))


def build_preference(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(
        (Message("user", prompt),),
        (Message("assistant", chosen),),
        (Message("assistant", rejected),),
        id="p1",
        group_id="g",
        margin=2.0,
        annotator="ann",
    )


def build_feedback(prompt: str, completion: str, label: bool) -> Feedback:
    return Feedback((Message("user", prompt),), (Message("assistant", completion),), label, "f1")
